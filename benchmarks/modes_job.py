"""One training of modes.py: the whole model in one process, with the real codecs at both cuts.

What a frozen trunk answers is computed once per example, as an edge fetches it once; the head is computed for
learned tokens only, as at an edge.

B = batch, T = tokens of the longest text, N = tokens, D = hidden size, V = vocabulary.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tightbeam.common.wire.codecs import codec

MAX_TOKENS, BATCH, EPOCHS, WARMUP, NUM_VALIDATION = 128, 16, 3, 30, 200
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """Where adapters sit, what crosses the cuts, and from which epoch on the bottom is frozen."""

    bottom: int = 4
    top: int = 0
    activations: str = "fp32"
    gradients: str = "fp32"
    freeze_after: float | None = None  # epochs; 0 is mode `top`
    whole: bool = False  # adapters everywhere and nothing crosses: the baseline
    taps: int | None = None  # of mode `side`; 0: no ladder
    from_backbone: bool = False  # the ladder starts from backbone weights
    rank: int = 16
    lr: float = 2e-3
    batch: int = BATCH
    dropout: float = 0.0  # of LoRA
    noise: float = 0.0  # on what a frozen trunk gave, as the edge's `train.noise`

    def bytes_per_token(self, epochs: int, width: int, tap_size: int = 0) -> float:
        """Bytes that cross over the whole run per token of the data set."""
        if self.whole:
            return 0.0
        activations, gradients = (_row_bytes(name, width) for name in (self.activations, self.gradients))
        if self.taps is not None:
            return 2 * activations + self.taps * _row_bytes(self.activations, tap_size)
        trained = float(epochs) if self.freeze_after is None else self.freeze_after
        once = 0.0 if self.freeze_after is None else 1.0
        return trained * 2 * (activations + gradients) + once * 2 * activations


def job_options() -> argparse.ArgumentParser:
    """Of the options that every job needs."""
    options = argparse.ArgumentParser(description="Quality of the modes on a dictionary.")
    options.add_argument("--model", type=Path)
    options.add_argument("--data", type=Path, help="folder written by jargon.py")
    options.add_argument("--seeds", default="0")
    options.add_argument("--lr", type=float, default=None, help="instead of the mode's own")
    options.add_argument("--epochs", type=int, default=EPOCHS)
    options.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--limit", type=int, default=None, help="use fewer examples")
    options.add_argument(
        "--validate", action="store_true", help="judge by training texts that are kept apart"
    )
    return options


class Crossing(nn.Module):
    """One cut: what passes is coded and decoded, as a step over the wire does to real tokens only."""

    def __init__(self, forward_codec: str, backward_codec: str) -> None:
        super().__init__()
        self.forward_codec, self.backward_codec = forward_codec, backward_codec
        self.keep_BT: Tensor | None = None
        self.detach = self.passes = False

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the hidden states as the other side gets them."""
        assert self.keep_BT is not None
        if self.passes:
            return hidden_BTD
        if self.detach:
            hidden_BTD = hidden_BTD.detach()
        decoded_BTD = torch.zeros_like(hidden_BTD)
        decoded_BTD[self.keep_BT] = recode_rows(hidden_BTD.detach()[self.keep_BT], self.forward_codec).to(
            decoded_BTD.dtype
        )
        out_BTD: Tensor = _Cross.apply(hidden_BTD, decoded_BTD, self.keep_BT, self.backward_codec)  # type: ignore[no-untyped-call]  # torch leaves `apply` bare
        return out_BTD


class _Cross(torch.autograd.Function):
    """The decoded values forward, the decoded gradient backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BTD: Tensor, decoded_BTD: Tensor, keep_BT: Tensor, backward_codec: str
    ) -> Tensor:
        ctx.keep_BT, ctx.backward_codec = keep_BT, backward_codec
        return decoded_BTD

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.backward_codec == "fp32":
            return grad_BTD, None, None, None
        out_BTD = torch.zeros_like(grad_BTD)
        out_BTD[ctx.keep_BT] = recode_rows(grad_BTD[ctx.keep_BT], ctx.backward_codec)
        return out_BTD, None, None, None


def recode_rows(rows_ND: Tensor, name: str) -> Tensor:
    """Rows as the other side gets them."""
    if name == "fp32":
        return rows_ND
    coder = codec(name)
    decoded_ND = coder.decode(coder.encode(rows_ND.float()), tuple(rows_ND.shape), torch.float32)
    return decoded_ND.to(rows_ND.device, rows_ND.dtype)


def _row_bytes(name: str, width: int) -> float:
    return codec(name).num_bytes((1024, width)) / 1024


class Job:
    """One mode trained with one seed."""

    def __init__(self, arguments: argparse.Namespace, mode: Mode, seed: int) -> None:
        self.mode, self.seed, self.lr = mode, seed, arguments.lr or mode.lr
        self.epochs: int = arguments.epochs
        self.device = torch.device(arguments.device)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        train, judged = (
            _examples(arguments.data / f"{name}.jsonl", tokenizer, arguments.max_tokens)
            for name in ("train", "eval")
        )
        if arguments.validate:
            train, judged = train[:-NUM_VALIDATION], train[-NUM_VALIDATION:]
        self.train, self.eval = train[: arguments.limit], judged[: arguments.limit]
        attention = "eager" if arguments.device == "cpu" else "sdpa"  # whose bf16 is slow on CPUs
        model: Any = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, attn_implementation=attention
        )
        model.to(self.device)
        blocks = model.model.layers
        num_blocks = len(blocks)
        self.bottom, self.top = range(mode.bottom), range(num_blocks - mode.top, num_blocks)
        self.below_top, self.top_blocks = blocks[: self.top.start], blocks[self.top.start :]
        self.up = Crossing(mode.activations, mode.gradients)
        self.down = Crossing(mode.activations, mode.gradients)
        if not mode.whole:
            self._cross(blocks)
        adapted = range(num_blocks) if mode.whole else [*self.bottom, *self.top]
        torch.manual_seed(seed)
        config = LoraConfig(
            r=mode.rank,
            lora_alpha=2 * mode.rank,
            lora_dropout=mode.dropout,
            target_modules=PROJECTIONS,
            layers_to_transform=list(adapted),
        )
        self.model: Any = get_peft_model(model.eval(), config)
        self.inner: Any = self.model.base_model.model.model
        for module in self.inner.layers.modules():  # once, where autocast would in every step
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.to(torch.bfloat16)
        self.answers: dict[int, Tensor] | None = None  # of a frozen trunk, by row of the training data
        if mode.freeze_after == 0:
            self._freeze()

    def run(self) -> dict[str, Any]:
        """Train; give the losses."""
        before, began_s = self.evaluate(), time.perf_counter()
        trained = self.parameters()
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        batches = list(self._batches())
        freeze_at = (
            None
            if self.mode.freeze_after is None
            else int(self.mode.freeze_after * len(batches) / self.epochs)
        )
        for step, rows in enumerate(batches):
            if freeze_at and step == freeze_at:
                self._freeze()
            rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            optimizer.param_groups[0]["lr"] = self.lr * rate
            self._to_training()
            total, learned = self._loss([self.train[row] for row in rows], rows)
            optimizer.zero_grad(set_to_none=True)
            (total / learned).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        return {"before": before, "loss": self.evaluate(), "train_s": round(time.perf_counter() - began_s, 1)}

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the learned tokens of the evaluation data."""
        self.model.eval()
        totals = [self._loss(self.eval[i : i + 32]) for i in range(0, len(self.eval), 32)]
        return sum(float(total) for total, _ in totals) / sum(learned for _, learned in totals)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def hidden(self, input_ids_BT: Tensor, keep_BT: Tensor, rows: list[int] | None) -> Tensor:
        """What enters the head; `keep_BT` tells tokens from padding, `rows` are of the training data."""
        self.up.keep_BT = self.down.keep_BT = keep_BT
        if rows is not None and self.answers is not None:
            return self._hidden_of_top(input_ids_BT, keep_BT, rows, self.answers)
        hidden_BTD: Tensor = self.inner(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD

    def _hidden_of_top(
        self, input_ids_BT: Tensor, keep_BT: Tensor, rows: list[int], answers: dict[int, Tensor]
    ) -> Tensor:
        blocks = self.inner.layers
        if missing := [place for place, row in enumerate(rows) if row not in answers]:
            self.inner.layers, self.up.keep_BT = self.below_top, keep_BT[missing]
            with torch.no_grad():
                self.inner(input_ids=input_ids_BT[missing], use_cache=False)
            for place, last_TD in zip(missing, self.below, strict=True):
                answers[rows[place]] = recode_rows(last_TD[keep_BT[place]], self.mode.activations)
        decoded_BTD = pad_sequence([answers[row] for row in rows], batch_first=True)
        if self.mode.noise:
            spread = decoded_BTD.float().std(dim=-1)[keep_BT].median()
            decoded_BTD = decoded_BTD + self.mode.noise * spread * torch.randn_like(decoded_BTD)
        self.inner.layers, self.down.passes = self.top_blocks, True
        hidden_BTD: Tensor = self.inner(inputs_embeds=decoded_BTD, use_cache=False).last_hidden_state
        self.inner.layers, self.down.passes = blocks, False
        return hidden_BTD

    def _to_training(self) -> None:
        """Dropout where blocks are trained; frozen ones run as in evaluation."""
        self.model.train()
        if self.down.detach:
            for index in self.bottom:
                self.below_top[index].eval()

    def _cross(self, blocks: nn.ModuleList) -> None:
        blocks[self.bottom.stop].register_forward_pre_hook(lambda _, args: (self.up(args[0]), *args[1:]))
        blocks[self.top.start].register_forward_pre_hook(lambda _, args: (self.down(args[0]), *args[1:]))
        blocks[self.top.start - 1].register_forward_hook(self._note_below)

    def _note_below(self, block: nn.Module, args: tuple[Any, ...], out_BTD: Tensor) -> None:
        self.below = out_BTD.detach()

    def _loss(
        self, examples: list[tuple[list[int], int]], rows: list[int] | None = None
    ) -> tuple[Tensor, int]:
        length = max(len(ids) for ids, _ in examples)
        input_ids = torch.zeros(len(examples), length, dtype=torch.int64)
        keep = torch.zeros_like(input_ids, dtype=torch.bool)
        learned = torch.zeros_like(keep)
        for row, (ids, prompt) in enumerate(examples):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            keep[row, : len(ids)] = True
            learned[row, prompt : len(ids)] = True
        input_ids, keep, learned = (t.to(self.device) for t in (input_ids, keep, learned[:, 1:]))
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden_BTD = self.hidden(input_ids, keep, rows)
            logits_NV = self.model.get_output_embeddings()(hidden_BTD[:, :-1][learned])
        total = cross_entropy(logits_NV.float(), input_ids[:, 1:][learned], reduction="sum")
        return total, len(logits_NV)

    def _batches(self) -> Iterator[list[int]]:
        for epoch in range(self.epochs):
            order = list(range(len(self.train)))
            random.Random(1000 * self.seed + epoch).shuffle(order)
            size = self.mode.batch
            yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))

    def _freeze(self) -> None:
        """The bottom's adapter stays in place and no gradient crosses any more."""
        self.down.detach = True
        self.answers = {}
        for index in self.bottom:
            for parameter in self.model.base_model.model.model.layers[index].parameters():
                parameter.requires_grad_(False)
                parameter.grad = None


def _examples(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[tuple[list[int], int]]:
    """Token ids and the length of the prompt; entries without an answer within the limit are left out."""
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole))
        if min(len(ids), max_tokens) > len(prompt):
            out.append((ids[:max_tokens], len(prompt)))
    return out
