"""What each codec costs in eval loss on real text: `codec_quality.py --model DIR --text FILE`.

The hidden states at both cuts of `--cut` go through the codec, as in a forward step of `ushape`; everything
else is the whole model. The text (gzip and dictd's .dz too) is joined to one line and cut into sequences of
`--tokens` tokens, of which `--sequences` are taken at even distance. Prints one JSON line per codec: mean
loss in nats per token, the paired difference to no codec with its standard error, the relative error of the
hidden states at either cut (root mean square over tokens), and bytes per token and crossing.
"""

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tightbeam.common.wire.codecs import CODECS, codec

BATCH_SIZE = 16


class Crossing:
    """Stands where a hidden state crosses the wire; without a codec it passes everything."""

    def __init__(self) -> None:
        self.codec_name: str | None = None
        self.square_errors: list[Tensor] = []

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the block behind the cut."""
        if self.codec_name is None:
            return None
        hidden_BTD = args[0]
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        which = codec(self.codec_name)
        decoded_ND = which.decode(
            which.encode(hidden_ND), hidden_ND.shape, hidden_ND.dtype, device=hidden_ND.device
        )
        self.square_errors.append((decoded_ND - hidden_ND).norm(dim=1) / hidden_ND.norm(dim=1))
        return (decoded_ND.view_as(hidden_BTD), *args[1:]), kwargs

    def relative_error(self) -> float:
        """Root mean square over tokens since the last call."""
        errors, self.square_errors = self.square_errors, []
        return float(torch.cat(errors).square().mean().sqrt()) if errors else 0.0


@contextmanager
def crossings(model: nn.Module, cut: str) -> Iterator[tuple[Crossing, Crossing]]:
    """Hooks at both cuts of a Llama-like model."""
    bottom, top = (int(part) for part in cut.split(":"))
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    up, down = Crossing(), Crossing()
    hooks = [
        blocks[index].register_forward_pre_hook(crossing, with_kwargs=True)
        for index, crossing in ((bottom, up), (len(blocks) - top, down))
    ]
    yield up, down
    for hook in hooks:
        hook.remove()


def sequences(path: Path, tokenize: Callable[[str], list[int]], num_tokens: int, count: int) -> Tensor:
    """Token ids `[count, num_tokens]` at even distance through the text."""
    opener = gzip.open if path.suffix in (".gz", ".dz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        ids = torch.tensor(tokenize(" ".join(file.read().split())))
    rows = ids[: len(ids) // num_tokens * num_tokens].view(-1, num_tokens)
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


@torch.no_grad()
def token_losses(model: nn.Module, ids_ST: Tensor) -> Tensor:
    """Cross entropy of every predicted token."""
    losses = []
    for ids_BT in ids_ST.split(BATCH_SIZE):
        logits = model(input_ids=ids_BT).logits[:, :-1].float()
        losses.append(
            nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        )
    return torch.cat(losses)


def main() -> None:
    """Print one JSON line per codec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--cut", default="2:2")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--codecs", nargs="+", default=["bf16", "int8", "int5", "int4"], choices=list(CODECS))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.eval().to(arguments.device)
    ids_ST = sequences(
        arguments.text, lambda text: list(tokenizer(text)["input_ids"]), arguments.tokens, arguments.sequences
    ).to(arguments.device)
    with crossings(model, arguments.cut) as (up, down):
        plain = token_losses(model, ids_ST)
        for name in arguments.codecs:
            up.codec_name = down.codec_name = name
            delta = token_losses(model, ids_ST) - plain
            row = {
                "codec": name,
                "cut": arguments.cut,
                "tokens": ids_ST.numel(),
                "loss": float(plain.mean() + delta.mean()),
                "loss_delta": float(delta.mean()),
                "loss_delta_stderr": float(delta.std() / len(delta) ** 0.5),
                "relative_error_up": up.relative_error(),
                "relative_error_down": down.relative_error(),
                "bytes_per_token": CODECS[name].num_bytes((1, model.config.hidden_size)),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
