"""How far delta coding gets while a bottom trains: `delta_quality.py --model DIR --text FILE`.

LoRA trains two bottom and two top blocks of the whole model for a few epochs. At cut 2 the activations of
each sample are coded alone and as a delta to their last decoded value, in the same number of bytes but for 24
per sample. Prints one JSON line per epoch: loss, how far the activations moved since the epoch before, and
the error of either way by codec; all relative to the activations, root mean square over tokens.
"""

import argparse
import gzip
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tightbeam.common.wire.codecs import codec
from tightbeam.common.wire.delta import KEY_BYTES, BaseStore, Samples, encode_delta

CODECS = ("int4", "int5", "int8")
BATCH_SIZE, NUM_TOKENS, CUT = 8, 96, 2


class Errors:
    """Squares of relative errors, by name, until they are reported."""

    def __init__(self) -> None:
        self._squares: dict[str, list[Tensor]] = {}

    def add(self, name: str, found_ND: Tensor, wanted_ND: Tensor) -> None:
        """Count the rows of one batch."""
        squares_N = ((found_ND.float() - wanted_ND).norm(dim=1) / wanted_ND.norm(dim=1)).square()
        self._squares.setdefault(name, []).append(squares_N)

    def take(self) -> dict[str, float]:
        """Root mean squares, and start anew."""
        found, self._squares = self._squares, {}
        return {name: math.sqrt(float(torch.cat(parts).mean())) for name, parts in found.items()}


def compare(errors: Errors, stores: dict[str, BaseStore], hidden_ND: Tensor, first_sample: int) -> None:
    """Code one batch in both ways."""
    keys = [(first_sample + index).to_bytes(KEY_BYTES, "little") for index in range(BATCH_SIZE)]
    samples = Samples.of(keys, [NUM_TOKENS] * BATCH_SIZE, hidden_ND.shape[1])
    for name, store in stores.items():
        alone_ND = codec(name).decode(codec(name).encode(hidden_ND), hidden_ND.shape, torch.float32)
        errors.add(name, alone_ND, hidden_ND)
        _, decoded_ND = encode_delta(name, hidden_ND, store.latest(samples), samples.lengths)
        store.remember(samples, decoded_ND)
        errors.add(f"delta_{name}", decoded_ND, hidden_ND)


def train(model: nn.Module, blocks: nn.ModuleList, ids_ST: Tensor, epochs: int, rate: float) -> None:
    """Train, and print a line per epoch."""
    seen: list[Tensor] = []
    blocks[CUT].register_forward_pre_hook(lambda block, args: seen.append(args[0].detach()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    stores = {name: BaseStore() for name in CODECS}
    errors, before, losses = Errors(), dict[int, Tensor](), list[float]()
    for epoch in range(epochs):
        for start in range(0, len(ids_ST), BATCH_SIZE):
            ids_BT = ids_ST[start : start + BATCH_SIZE]
            output: Any = model(input_ids=ids_BT, labels=ids_BT)
            hidden_ND = seen.pop().flatten(0, 1).float().cpu()
            if start in before:
                errors.add("moved", before[start], hidden_ND)
            before[start] = hidden_ND
            compare(errors, stores, hidden_ND, start)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(output.loss.detach()))
        print(json.dumps({"epoch": epoch, "loss": sum(losses) / len(losses), **errors.take()}), flush=True)
        losses.clear()


def main() -> None:
    """Load, add adapters, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(arguments.device)
    with gzip.open(arguments.text, "rt", encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(" ".join(file.read().split()))["input_ids"])
    rows = ids[: len(ids) // NUM_TOKENS * NUM_TOKENS].view(-1, NUM_TOKENS)
    num_sequences = arguments.sequences // BATCH_SIZE * BATCH_SIZE
    ids_ST = rows[torch.linspace(0, len(rows) - 1, num_sequences).long()].to(arguments.device)
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    last = len(blocks) - 1
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=rf".*\.layers\.(0|1|{last - 1}|{last})\..*_proj",
        ),
    )
    train(adapted, blocks, ids_ST, arguments.epochs, arguments.rate)


if __name__ == "__main__":
    main()
