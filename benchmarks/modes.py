"""Quality of the modes on a real task: how much of full LoRA's gain each keeps, and what it moves.

SmolLM2-135M on the Jargon File (`jargon.py`): 2,010 training and 256 evaluation entries cut to 128 tokens,
three epochs, batches of 16, LoRA r=16 on all linears of the blocks that stay at the edge, AdamW, cosine
schedule with 30 warm-up steps, loss on the definition only. Everything runs in one process: the whole model
with the real codecs at both cuts, forward and backward, which is what the split model computes
(tests/exactness). bf16 autocast.

    python benchmarks/modes.py --model FOLDER --data FOLDER --modes full,ushape-4:4 --seeds 0,1,2 --lr 1e-3

Prints one JSON line per mode and seed: loss in nats per learned token before and after, and the bytes that
cross over the whole run per token of the data set. `--summary FILES` joins such lines into the table of
docs/modes.md, each mode at its better learning rate, with `share_of_full_lora_gain`.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tightbeam.common.wire.codecs import codec

MAX_TOKENS, BATCH, EPOCHS, RANK, WARMUP = 128, 16, 3, 16, 30
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


@dataclass(frozen=True)
class Mode:
    """Where adapters sit, what crosses the cuts, and from which epoch on the bottom is frozen."""

    bottom: int
    top: int
    activations: str = "fp32"
    gradients: str = "fp32"
    freeze_after: float | None = None  # epochs; 0 is mode `top`
    whole: bool = False  # adapters everywhere and nothing crosses: the baseline

    def bytes_per_token(self, epochs: int, codec_bytes: dict[str, float]) -> float:
        """Bytes that cross over the whole run per token of the data set, given those of each codec."""
        if self.whole:
            return 0.0
        trained = float(epochs) if self.freeze_after is None else self.freeze_after
        once = 0.0 if self.freeze_after is None else 1.0
        activations, gradients = codec_bytes[self.activations], codec_bytes[self.gradients]
        return trained * 2 * (activations + gradients) + once * 2 * activations


MODES = {
    "full": Mode(0, 0, whole=True),
    "ushape-4:4": Mode(4, 4),
    "ushape-4:4-int8": Mode(4, 4, "int8", "int8"),
    "ushape-4:4-int4-int8": Mode(4, 4, "int4", "int8"),
    "ushape-2:2": Mode(2, 2),
    "ushape-4:8": Mode(4, 8),
    "freeze-4:8-half": Mode(4, 8, freeze_after=0.5),
    "freeze-4:8-half-int4-int8": Mode(4, 8, "int4", "int8", freeze_after=0.5),
    "freeze-4:8-one": Mode(4, 8, freeze_after=1.0),
    "top-4": Mode(4, 4, freeze_after=0.0),
    "top-8": Mode(4, 8, freeze_after=0.0),
    "top-8-int4": Mode(4, 8, "int4", "int4", freeze_after=0.0),
    "top-12": Mode(4, 12, freeze_after=0.0),
}


class Crossing(nn.Module):
    """One cut: what passes is coded and decoded, as a step over the wire does to real tokens only."""

    def __init__(self, forward_codec: str, backward_codec: str) -> None:
        super().__init__()
        self.forward_codec, self.backward_codec = forward_codec, backward_codec
        self.keep_BT: Tensor | None = None
        self.detach = False

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the hidden states as the other side gets them."""
        assert self.keep_BT is not None
        if self.detach:
            hidden_BTD = hidden_BTD.detach()
        out_BTD: Tensor = _Cross.apply(hidden_BTD, self.keep_BT, self.forward_codec, self.backward_codec)  # type: ignore[no-untyped-call]
        return out_BTD


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_BTD: Tensor, keep_BT: Tensor, forward_codec: str, backward_codec: str
    ) -> Tensor:
        ctx.keep_BT, ctx.backward_codec = keep_BT, backward_codec
        return _recode(hidden_BTD, keep_BT, forward_codec)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None, None, None]:
        return _recode(grad_BTD, ctx.keep_BT, ctx.backward_codec), None, None, None


def _recode(tensor_BTD: Tensor, keep_BT: Tensor, name: str) -> Tensor:
    if name == "fp32":
        return tensor_BTD
    rows_ND = tensor_BTD[keep_BT]
    coder = codec(name)
    decoded_ND = coder.decode(coder.encode(rows_ND.float()), tuple(rows_ND.shape), torch.float32)
    out_BTD = torch.zeros_like(tensor_BTD)
    out_BTD[keep_BT] = decoded_ND.to(tensor_BTD.device, tensor_BTD.dtype)
    return out_BTD


class Job:
    """One mode trained with one seed."""

    def __init__(self, arguments: argparse.Namespace, mode: Mode, seed: int) -> None:
        self.mode, self.seed, self.lr = mode, seed, arguments.lr
        self.device = torch.device(arguments.device)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.train = _examples(arguments.data / "train.jsonl", tokenizer)[: arguments.limit]
        self.eval = _examples(arguments.data / "eval.jsonl", tokenizer)[: arguments.limit]
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        model.to(self.device)
        blocks = model.model.layers
        num_blocks = len(blocks)
        self.bottom, self.top = range(mode.bottom), range(num_blocks - mode.top, num_blocks)
        self.up = Crossing(mode.activations, mode.gradients)
        self.down = Crossing(mode.activations, mode.gradients)
        if not mode.whole:
            blocks[mode.bottom].register_forward_pre_hook(lambda _, args: (self.up(args[0]), *args[1:]))
            blocks[self.top[0]].register_forward_pre_hook(lambda _, args: (self.down(args[0]), *args[1:]))
        adapted = range(num_blocks) if mode.whole else [*self.bottom, *self.top]
        torch.manual_seed(seed)
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, layers_to_transform=list(adapted)
        )
        self.model: Any = get_peft_model(model.eval(), config)
        if mode.freeze_after == 0:
            self._freeze()

    def run(self) -> dict[str, Any]:
        """Train; give the losses."""
        before, began_s = self.evaluate(), time.perf_counter()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        batches = list(self._batches())
        freeze_at = (
            None if self.mode.freeze_after is None else int(self.mode.freeze_after * len(batches) / EPOCHS)
        )
        for step, rows in enumerate(batches):
            if freeze_at and step == freeze_at:
                self._freeze()
            rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
            total, learned = self._loss([self.train[row] for row in rows])
            optimizer.zero_grad(set_to_none=True)
            (total / learned).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        return {"before": before, "loss": self.evaluate(), "train_s": round(time.perf_counter() - began_s, 1)}

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the learned tokens of the evaluation data."""
        totals = [self._loss(self.eval[i : i + 32]) for i in range(0, len(self.eval), 32)]
        return sum(float(total) for total, _ in totals) / sum(learned for _, learned in totals)

    def _loss(self, examples: list[tuple[list[int], int]]) -> tuple[Tensor, int]:
        length = max(len(ids) for ids, _ in examples)
        input_ids = torch.zeros(len(examples), length, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED)
        keep = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (ids, prompt) in enumerate(examples):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
            keep[row, : len(ids)] = True
        self.up.keep_BT = self.down.keep_BT = keep.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(input_ids=input_ids.to(self.device), use_cache=False).logits
        targets = labels[:, 1:].to(self.device)
        total = cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total, int((labels[:, 1:] != IGNORED).sum())

    def _batches(self) -> Iterator[list[int]]:
        for epoch in range(EPOCHS):
            order = list(range(len(self.train)))
            random.Random(1000 * self.seed + epoch).shuffle(order)
            yield from (order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH))

    def _freeze(self) -> None:
        """The bottom's adapter stays in place and no gradient crosses any more."""
        self.down.detach = True
        for index in self.bottom:
            for parameter in self.model.base_model.model.model.layers[index].parameters():
                parameter.requires_grad_(False)
                parameter.grad = None


def _examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int]]:
    """Token ids and the length of the prompt; entries without an answer within the limit are left out."""
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt = len(tokenizer(record["prompt"])["input_ids"])
        ids = tokenizer(record["prompt"] + record["completion"])["input_ids"][:MAX_TOKENS]
        if len(ids) > prompt:
            out.append((ids, prompt))
    return out


def summarise(files: list[Path]) -> None:
    """Print one JSON line per mode: mean and spread over seeds, at each mode's better learning rate."""
    rows = [
        json.loads(line) for file in files for line in file.read_text().splitlines() if line.startswith("{")
    ]
    losses: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in rows:
        losses[row["mode"], row["lr"]].append(row["loss"])
    best = {
        mode: min((statistics.mean(v), lr) for (name, lr), v in losses.items() if name == mode)[1]
        for mode in {row["mode"] for row in rows}
    }
    before = rows[0]["before"]
    gain = before - statistics.mean(losses["full", best["full"]])
    for mode in sorted(best, key=lambda name: statistics.mean(losses[name, best[name]])):
        values = losses[mode, best[mode]]
        row = next(r for r in rows if r["mode"] == mode)
        shares = [(before - loss) / gain for loss in values]
        line = {
            "mode": mode,
            "eval_loss": round(statistics.mean(values), 4),
            "share_of_full_lora_gain": round(statistics.mean(shares), 4),
            "spread": round(max(shares) - min(shares), 4),
            "seeds": len(values),
            "lr": best[mode],
            "bytes_per_token": row["bytes_per_token"],
        }
        print(json.dumps(line))


def main() -> None:
    """Train what was asked, or summarise."""
    parser = argparse.ArgumentParser(description="Quality of the modes on the Jargon File.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, help="folder written by jargon.py")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, default=None, help="use fewer examples")
    parser.add_argument("--summary", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.summary:
        summarise(arguments.summary)
        return
    for name in arguments.modes.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            mode = MODES[name]
            job = Job(arguments, mode, seed)
            width = job.model.config.hidden_size
            sizes = {c: codec(c).num_bytes((1024, width)) / 1024 for c in (mode.activations, mode.gradients)}
            row = {"mode": name, "seed": seed, "lr": arguments.lr, **job.run()}
            print(
                json.dumps(row | {"bytes_per_token": round(mode.bytes_per_token(EPOCHS, sizes), 1)}),
                flush=True,
            )


if __name__ == "__main__":
    main()
