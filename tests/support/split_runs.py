"""A small split training run over a real cloud, and what it must leave equal whatever happens on the way."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from support.edge_runs import byte_tokenizer, tiny_llama
from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.edge import connect
from tightbeam.edge.link.carrier import RetryPolicy
from tightbeam.edge.link.connection import Cloud
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["SplitRun", "save_tiny_model", "split_run"]

QUICK = RetryPolicy(first_wait_s=0.05, longest_wait_s=0.5, give_up_after_s=60.0, longest_silence_s=5.0)


def save_tiny_model(folder: Path) -> Path:
    """A random Llama of six blocks with a byte tokenizer beside it."""
    tiny_llama(num_hidden_layers=6).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class SplitRun:
    """One connected edge: a LoRA model, its rows and its retries."""

    cloud: Cloud
    model: peft.PeftModel
    rows: list[StepRow] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-2)

    def gradients(self, seed: int = 0, between: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """One forward and backward; `between` happens between the two."""
        self.model.zero_grad()
        loss = self.model(**batch(seed)).loss
        between()
        loss.backward()
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def train(
        self, steps: int, batches: int | None = None, between: Callable[[int], None] = lambda step: None
    ) -> dict[str, Tensor]:
        """A short training, over `batches` batches in turn; gives the adapter.

        `between` happens between forward and backward.
        """
        for step in range(steps):
            self.gradients(step % (batches or steps), functools.partial(between, step))
            self._optimizer.step()
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def billed(self) -> StepBytes:
        """By the edge's own account."""
        total = StepBytes()
        for row in self.rows:
            total = total + row.bytes
        return total

    def usage(self) -> pb.RunUsage:
        """This run by the cloud's account."""
        (mine,) = [run for run in self.cloud.usage() if run.run == self.cloud.run]
        return mine

    def assert_accounts_agree(self) -> None:
        """Edge and cloud name the same steps, tokens, FLOPs and bytes."""
        usage = self.usage()
        steps = {kind: sum(row.kind == kind for row in self.rows) for kind in ("forward", "backward")}
        assert steps == {"forward": usage.forward_steps, "backward": usage.backward_steps}
        assert sum(row.tokens for row in self.rows) == usage.tokens
        receipt = {name.name: getattr(usage.bytes, name.name) for name in usage.bytes.DESCRIPTOR.fields}
        assert {name: getattr(self.billed, name) for name in receipt} == receipt


def batch(seed: int, rows: int = 2, length: int = 10) -> dict[str, Tensor]:
    """A few random tokens, the second row shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 261, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def split_run(
    address: str, *, policy: RetryPolicy = QUICK, codec: str = "auto", **options: Any
) -> Iterator[SplitRun]:
    """Connect, load the model at cut 1:1 and put a seeded LoRA adapter on it."""
    rows: list[StepRow] = []
    retries: list[str] = []

    def on_row(row: dict[str, Any]) -> None:
        if row["row"] == "step":
            rows.append(StepRow.from_json(row))

    with connect(
        address, policy=policy, on_row=on_row, on_retry=retries.append,
        **({"insecure": True} | options),
    ) as cloud:  # fmt: skip
        model = cloud.load_model("1:1", codec=codec)
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        )
        yield SplitRun(cloud, peft.get_peft_model(model, config), rows, retries)
