"""What the training loop tells its listeners: the ledger, the metrics file, the progress bar, trackers.

Steps are optimizer steps, counted from 1; step 0 is before the first. Losses are nats per learned token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tightbeam.common.accounts.rows import StepRow

__all__ = [
    "Evaluated",
    "EvaluationStarted",
    "Event",
    "Froze",
    "Listener",
    "Listeners",
    "Saved",
    "StepDone",
    "StepStarted",
    "Transferred",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted:
    """An optimizer step begins."""

    step: int
    total_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """An optimizer step has changed the weights."""

    step: int
    epoch: float  # passes over the training data so far
    loss: float  # before the step, without a penalty
    lr: float
    grad_norm: float  # before it was clipped
    tokens: int  # trained on, padding left out
    learned_tokens: int
    wall_s: float
    edge_s: float  # of them, not waiting for the cloud
    edge_flops: int
    evaluation_follows: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationStarted:
    """An evaluation begins."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The held-out data have been evaluated after a step."""

    step: int
    loss: float
    tokens: int
    learned_tokens: int
    edge_flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """A forward or a backward has crossed."""

    row: StepRow
    evaluating: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Froze:
    """Nothing below the cut is trained from here on."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint is on disk."""

    step: int
    path: Path


Event = StepStarted | StepDone | EvaluationStarted | Evaluated | Transferred | Froze | Saved
Listener = Callable[[Event], None]


class Listeners(list[Listener]):
    """Several listeners as one; each event reaches them in their order."""

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        for listener in self:
            listener(event)
