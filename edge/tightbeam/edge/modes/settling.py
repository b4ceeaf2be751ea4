"""The rule of `train.freeze_bottom_after: auto`: when a distance that grows with training has settled.

The distance is looked at every tenth of an epoch. The bottom is frozen when it has grown by no more than a
tenth over the last three looks; not before half an epoch, at the latest after a whole one. One look alone
says little: on real texts the distance shrinks between two looks although it grows over five.

Needs the standard library alone: `benchmarks/freeze_rule.py` runs this very file on machines that have
nothing of the edge.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["LOOKS_PER_EPOCH", "PROBE_TOKENS", "Settling"]

LOOKS_PER_EPOCH = 10
PROBE_TOKENS = 512  # on which the distance is taken
_WINDOW_LOOKS = 3
_GROWTH = 0.1
_EARLIEST_EPOCHS = 0.5


@dataclass(slots=True)
class Settling:
    """Decides for one run; a checkpoint keeps the distances `looked` at."""

    steps_per_epoch: int
    looked: list[float] = field(default_factory=list)

    def looks(self, step: int) -> bool:
        """Whether the distance is taken before optimizer step `step`, counted from 0."""
        every = max(round(self.steps_per_epoch / LOOKS_PER_EPOCH), 1)
        return step > 0 and step % every == 0

    def says_freeze(self, step: int, distance: Callable[[], float]) -> bool:
        """Whether to freeze before optimizer step `step`; asks for the distance only when it looks."""
        if step >= self.steps_per_epoch:
            return True
        if not self.looks(step):
            return False
        self.looked.append(distance())
        return step >= _EARLIEST_EPOCHS * self.steps_per_epoch and self.settled

    @property
    def settled(self) -> bool:
        """Whether the distance has all but stopped growing."""
        if len(self.looked) <= _WINDOW_LOOKS:
            return False
        return self.looked[-1] <= self.looked[-1 - _WINDOW_LOOKS] * (1 + _GROWTH)
