"""Mode `top`: an adapter on the top blocks only, on activations that cross once and are cached.

Gradients and labels never cross: nothing below the cut asks for a gradient, so no backward ever follows.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tightbeam.common.errors import RecipeError
from tightbeam.edge.data import Example
from tightbeam.edge.modes.base import Job, Mode
from tightbeam.edge.modes.frozen import FrozenPhase

__all__ = ["FrozenBottom", "Top"]


class Top(Mode):
    """Frozen from the first step to the last."""

    phase_type: type[FrozenPhase] = FrozenPhase
    bottom_is_bare = True  # no adapter lies below the cut

    def __init__(self, job: Job, start_step: int = 0) -> None:
        super().__init__(job, start_step)
        self._phase = self.phase_type(job, start_step)
        if self._phase.bottom_sha256 and self.bottom_is_bare:
            self._phase.close()
            raise RecipeError(
                "The adapter trains something below the cut, which mode top keeps frozen.",
                cure="Take it out of adapter.extra, or use mode ushape.",
            )

    def before_step(self, step: int) -> None:
        """Fetch what the step needs, if it is not cached."""
        missing = self._phase.missing(self.job.rows_of(step))
        self.budget.check(self.job.moved_bytes(), self.budget.forward(missing), step)
        self._phase.before_step(step)

    def before_evaluation(self) -> None:
        """Fetch the evaluation's samples, if they are not cached."""
        self._phase.before_evaluation()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss over the learned tokens."""
        return self._phase.loss(batch)

    def flops(self, batch: dict[str, Tensor]) -> int:
        """Operations at the edge; the bottom's one pass ahead of the steps is not among them."""
        return self._phase.flops(batch)

    def crossing(self, examples: Sequence[Example]) -> list[Example]:
        """Those that the cache lacks, each text once; without a cache all of them."""
        missing = self._phase.missing(examples)
        if self._phase.cache is None:
            return missing
        return list({example.input_ids: example for example in missing}.values())

    def filling_flops(self, examples: Sequence[Example]) -> int:
        """Operations of the bottom on what crosses ahead; without a cache the steps count them."""
        return self._phase.filling_flops(examples)

    def before_checkpoint(self) -> bool:
        """Write the cache, so that a resumed run reads the same bits."""
        return self._phase.commit()

    def restore(self, state: dict[str, Any]) -> None:
        """See that the budget lasts: the whole pass is sent ahead of the steps, so it must fit as a whole."""
        filler = self._phase.filler
        if filler is not None and self.budget.is_set:
            self.budget.check(self.job.moved_bytes(), self.budget.ahead(filler.ahead), 0)

    def close(self) -> None:
        """Write and release the cache."""
        self._phase.close()


class FrozenBottom(Top):
    """As `top`, above a bottom whose adapter stays in place as it is."""

    bottom_is_bare = False
