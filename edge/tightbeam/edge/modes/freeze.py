"""A `ushape` run that freezes its bottom on the way and goes on as `top`, from a cache filled in one pass.

The bottom's adapter stays in place, in evaluation mode. The optimizer is the same object before and after:
the top's moments go on, the bottom's rest. When it happens is the recipe's `train.freeze_bottom_after`: a
number of epochs, of steps, or `auto` (see `settling.py`); earlier if else `train.max_mb` would be exceeded.
"""

import math
import re
from typing import Any

from torch import Tensor

from tightbeam.common.errors import BudgetError, TightbeamError
from tightbeam.edge.modes.base import Job, Mode
from tightbeam.edge.modes.frozen import FrozenPhase
from tightbeam.edge.modes.movement import Movement
from tightbeam.edge.training.events import Froze

__all__ = ["Freeze", "freeze_step"]


def freeze_step(value: float | str, steps_per_epoch: int) -> int | None:
    """The optimizer step before which to freeze; None for `auto`."""
    if value == "auto":
        return None
    if isinstance(value, str):
        number = re.fullmatch(r"(\d+) steps?", value)
        assert number is not None, "the recipe was checked"
        return int(number[1])
    return max(math.ceil(value * steps_per_epoch), 1)


class Freeze(Mode):
    """Trains bottom and top through the cloud, then the top alone."""

    def __init__(self, job: Job, start_step: int = 0) -> None:
        super().__init__(job, start_step)
        after = job.plan.train.freeze_bottom_after
        assert after is not None
        self._at = freeze_step(after, job.plan.steps_per_epoch)
        self._movement = Movement(job)
        self._phase: FrozenPhase | None = None
        self._pass_bytes = self.budget.forward([*job.train, *job.eval])

    @property
    def frozen(self) -> bool:
        """Whether the bottom is frozen by now."""
        return self._phase is not None

    def before_step(self, step: int) -> None:
        """Freeze when it is time, or while the budget still lasts for the pass that follows."""
        if self._phase is None and (reason := self._reason_to_freeze(step)):
            self.job.emit(Froze(step=step, reason=reason))
            self._freeze(step)
        if self._phase is not None:
            missing = self._phase.missing(self.job.rows_of(step))
            self.budget.check(self.job.moved_bytes(), self.budget.forward(missing), step)
            self._phase.before_step(step)

    def before_evaluation(self) -> None:
        """Fetch the evaluation's samples once, after the freeze."""
        if self._phase is not None:
            self._phase.before_evaluation()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss over the learned tokens."""
        return super().loss(batch) if self._phase is None else self._phase.loss(batch)

    def flops(self, batch: dict[str, Tensor]) -> int:
        """Operations at the edge."""
        return super().flops(batch) if self._phase is None else self._phase.flops(batch)

    def before_checkpoint(self) -> bool:
        """Write the cache, if there is one yet."""
        return self._phase is not None and self._phase.commit()

    def state(self) -> dict[str, Any]:
        """The phase, since when, and what the bottom was then."""
        if self._phase is None:
            return {"phase": "training", "distances": self._movement.rule.looked}
        phase = self._phase
        return {"phase": "frozen", "since_step": phase.start_step, "bottom_sha256": phase.bottom_sha256}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back into the phase of a checkpoint; its bottom must be the one the cache was filled with."""
        if state.get("phase") != "frozen":
            self._movement.rule.looked = list(state.get("distances", ()))
            return
        self._freeze(state["since_step"])
        assert self._phase is not None
        if self._phase.bottom_sha256 != state["bottom_sha256"]:
            raise TightbeamError(
                "The checkpoint's bottom is not the one that was frozen.", cure="Start a new run."
            )

    def close(self) -> None:
        """Write and release the cache."""
        if self._phase is not None:
            self._phase.close()

    def _freeze(self, step: int) -> None:
        self._phase = FrozenPhase(self.job, start_step=step)

    def _reason_to_freeze(self, step: int) -> str:
        """Why the bottom freezes before this step; empty when it does not."""
        job, moved = self.job, self.job.moved_bytes()
        if not self.budget.allows(moved, self._pass_bytes):
            raise BudgetError(
                f"One pass over the data needs up to {self._pass_bytes / 1e6:.1f} MB, {moved / 1e6:.1f} MB "
                f"have crossed already, and train.max_mb is {self.budget.max_bytes / 1e6:g}.",
                cure="Raise train.max_mb, or set a smaller codec such as int8.",
            )
        # An evaluation may come between this step and the next chance to freeze.
        ahead = self.budget.training(job.rows_of(step)) + self.budget.forward(job.eval) + self._pass_bytes
        if not self.budget.allows(moved, ahead):
            return f"train.max_mb is {self.budget.max_bytes / 1e6:g}"
        if self._at is not None:
            return f"train.freeze_bottom_after is {job.plan.train.freeze_bottom_after}" * (step >= self._at)
        return "its activations have settled" * self._movement.says_freeze(step)
