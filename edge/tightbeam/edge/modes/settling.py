"""The rule of `train.freeze_bottom_after: auto`: when a distance that grows with training has settled.

The distance is looked at every tenth of an epoch. The bottom is frozen when it has grown by no more than a
tenth since the last look; not before a quarter of an epoch, at the latest after a whole one. A distance that
grows with the number of steps runs into that bound; one that grows with its root (a random walk) ends after
0.6 epochs.

Needs the standard library alone: `benchmarks/freeze_rule.py` runs this very file on machines that have
nothing of the edge.
"""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["LOOKS_PER_EPOCH", "PROBE_TOKENS", "Settling", "settled"]

LOOKS_PER_EPOCH = 10
PROBE_TOKENS = 512  # on which the distance is taken
_GROWTH = 0.1
_EARLIEST_EPOCHS = 0.25


def settled(before: float, now: float) -> bool:
    """Whether a distance has all but stopped growing between two looks."""
    return now <= before * (1 + _GROWTH)


@dataclass(slots=True)
class Settling:
    """Decides for one run; `last` is the distance at the last look, which a checkpoint keeps."""

    steps_per_epoch: int
    last: float | None = None

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
        now, before = distance(), self.last
        self.last = now
        return before is not None and step >= _EARLIEST_EPOCHS * self.steps_per_epoch and settled(before, now)
