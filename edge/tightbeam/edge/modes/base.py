"""What the training loop asks of a mode, and the plain one: every step goes through the whole model.

The loop owns order, optimizer, schedule and files. A mode owns how a batch becomes a loss, when it needs the
cloud, and what of that a checkpoint must remember.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from tightbeam.common.accounts.flops import EdgeFlops
from tightbeam.edge.data import Example
from tightbeam.edge.modes.budget import Budget
from tightbeam.edge.recipe import CacheSection, SideSection
from tightbeam.edge.training.events import Listener
from tightbeam.edge.training.plan import Plan
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["Job", "Mode"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a mode works on."""

    cut: str
    model: PeftModel
    plan: Plan  # with the recipe's train section
    train: Sequence[Example]
    eval: Sequence[Example]
    fingerprint: str
    cache: CacheSection
    cache_folder: Path
    cache_secret: bytes | None  # of the edge's identity
    say: Callable[[str], None]
    emit: Listener
    moved_bytes: Callable[[], int]  # on the wire so far, whole run

    def rows_of(self, step: int) -> list[Example]:
        """The examples of an optimizer step."""
        return [self.train[row] for batch in self.plan.micro_batches(step) for row in batch]


class Mode:
    """`ushape`: bottom and top are trained through the trunk, which takes part in every step."""

    @staticmethod
    def extend(model: PeftModel, card: Card, side: SideSection) -> None:
        """Give an adapted model what else this mode trains, as the cloud's card allows."""

    def __init__(self, job: Job, start_step: int = 0) -> None:
        self.job = job
        self.budget = Budget.of(job.plan.train, job.model)
        self._flops = EdgeFlops.from_model(job.model)

    def before_step(self, step: int) -> None:
        """Get ready for optimizer step `step`, counted from 0.

        Raises `BudgetError` when the step would exceed `train.max_mb`.
        """
        self.budget.check(self.job.moved_bytes(), self.budget.training(self.job.rows_of(step)), step)

    def before_evaluation(self) -> None:
        """Get ready for an evaluation."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss over the learned tokens of a padded batch."""
        loss: Tensor = self.job.model(**batch, use_cache=False).loss
        return loss

    def flops(self, batch: dict[str, Tensor]) -> int:
        """Operations at the edge for a forward of the batch, and for its backward where gradients are on."""
        size, length = batch["input_ids"].shape
        backward = self._flops.backward(size, length) if torch.is_grad_enabled() else 0
        return self._flops.forward(size, length) + backward

    def crossing(self, examples: Sequence[Example]) -> list[Example]:
        """Those of `examples` that will have to cross when each is trained on, or evaluated, in turn."""
        return list(examples)

    def filling_flops(self, examples: Sequence[Example]) -> int:
        """Operations at the edge to send `examples` ahead of the steps; none where steps send their own."""
        return 0

    def before_checkpoint(self) -> bool:
        """Make durable what the checkpoint relies on; says whether anything crossed for it."""
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember, as JSON values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken; adapter and optimizer are restored already."""

    def close(self) -> None:
        """Let go of files; the model works as an ordinary split model again."""
