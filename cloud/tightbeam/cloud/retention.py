"""What the cloud keeps of a step between its forward and its backward, under a byte budget.

`hold` keeps the autograd graph: the backward costs nothing extra. `recompute` keeps only the boundary
input, hundreds of times smaller, and runs the forward again. Short of memory, the oldest graphs shrink to
their inputs first, then the oldest steps go; a backward that finds nothing is answered UNKNOWN_STEP and
brings its inputs along.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tightbeam.common.backbone import Segments

__all__ = ["Kept", "Retention", "StepKey"]

StepKey = tuple[str, str, int]
"""Session (hex), run, step. Another session never finds a step: two edges that share a run by mistake would
otherwise mix up their activations. An edge that reconnects sends its inputs again."""


@dataclass(slots=True)
class Kept:
    """One step waiting for its backward."""

    hidden_ND: Tensor  # boundary input; a leaf of the graph when `out_ND` is kept
    out_ND: Tensor | None  # None: recompute
    segments: Segments
    span: range
    num_bytes: int
    born_s: float = 0.0

    @property
    def input_bytes(self) -> int:
        """What remains when the graph is dropped."""
        return self.hidden_ND.numel() * self.hidden_ND.element_size()


class Retention:
    """The steps in flight. Used by the one device worker only, so it needs no lock."""

    def __init__(
        self,
        budget_bytes: int,
        graph_bytes: Callable[[Segments, range], int],
        *,
        lifetime_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._graph_bytes = graph_bytes
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._steps: OrderedDict[StepKey, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps)

    def can_hold(self, segments: Segments, span: range) -> bool:
        """Whether the graph of such a step fits beside what is kept."""
        self._expire()
        return self.used_bytes + self._graph_bytes(segments, span) <= self.budget_bytes

    def put(
        self, key: StepKey, hidden_ND: Tensor, out_ND: Tensor | None, segments: Segments, span: range
    ) -> None:
        """Keep a step; a step that does not fit even alone is not kept."""
        self.discard(key)
        kept = Kept(hidden_ND, out_ND, segments, span, 0, self._clock())
        kept.num_bytes = kept.input_bytes if out_ND is None else self._graph_bytes(segments, span)
        if kept.num_bytes > self.budget_bytes:
            return
        self._make_room(kept.num_bytes)
        self._steps[key] = kept
        self.used_bytes += kept.num_bytes

    def take(self, key: StepKey) -> Kept | None:
        """Remove and return a step; None when it is not kept."""
        kept = self._steps.pop(key, None)
        if kept is not None:
            self.used_bytes -= kept.num_bytes
        return kept

    def discard(self, key: StepKey) -> None:
        """Forget a step, if it is kept."""
        self.take(key)

    def discard_session(self, session: str) -> None:
        """Forget all steps of a session that ended."""
        for key in [key for key in self._steps if key[0] == session]:
            self.discard(key)

    def clear(self) -> None:
        """Forget everything."""
        self._steps.clear()
        self.used_bytes = 0

    def _expire(self) -> None:
        now = self._clock()
        for key in [key for key, kept in self._steps.items() if now - kept.born_s > self._lifetime_s]:
            self.discard(key)

    def _make_room(self, num_bytes: int) -> None:
        self._expire()
        for kept in self._steps.values():
            if self.used_bytes + num_bytes <= self.budget_bytes:
                return
            if kept.out_ND is not None:
                self.used_bytes -= kept.num_bytes - kept.input_bytes
                kept.out_ND, kept.hidden_ND = None, kept.hidden_ND.detach()
                kept.num_bytes = kept.input_bytes
        while self.used_bytes + num_bytes > self.budget_bytes:
            self.discard(next(iter(self._steps)))
