"""What the cloud keeps of a step between its forward and its backward, under a byte budget.

`hold` keeps the autograd graph: the backward costs nothing extra. `recompute` keeps only the boundary
input, hundreds of times smaller, and runs the forward again. Short of memory, the tenant that has the most
gives: its oldest graphs shrink to their inputs first, then its oldest steps go. A backward that finds nothing
is answered UNKNOWN_STEP and brings its inputs along.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tightbeam.common.backbone import Segments

__all__ = ["Kept", "Retention", "StepKey"]

_MAX_STEPS = 1024  # of one tenant


class StepKey(NamedTuple):
    """Whose step it is.

    Another session never finds it: two edges that share a run by mistake would otherwise mix up their
    activations. An edge that reconnects sends its inputs again.
    """

    tenant: str
    session: str  # hex
    run: str
    step: int


@dataclass(slots=True)
class Kept:
    """One step waiting for its backward."""

    hidden_ND: Tensor  # boundary input; a leaf of the graph when `out_ND` is kept
    out_ND: Tensor | None  # None: recompute
    segments: Segments
    span: range
    inputs_sha256: bytes  # of the boundary input as it crossed
    num_bytes: int = 0
    born_s: float = 0.0

    @property
    def input_bytes(self) -> int:
        """What remains when the graph is dropped."""
        return self.hidden_ND.numel() * self.hidden_ND.element_size()


class _Held:
    """The steps of one tenant, the oldest first."""

    def __init__(self) -> None:
        self.steps: OrderedDict[StepKey, Kept] = OrderedDict()
        self.graphs: OrderedDict[StepKey, Kept] = OrderedDict()  # those of them that hold one
        self.used_bytes = 0


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
        self._graph_bytes = graph_bytes
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._tenants: dict[str, _Held] = {}

    def __len__(self) -> int:
        return sum(len(held.steps) for held in self._tenants.values())

    @property
    def used_bytes(self) -> int:
        """By all tenants together."""
        return sum(held.used_bytes for held in self._tenants.values())

    def can_hold(self, tenant: str, segments: Segments, span: range) -> bool:
        """Whether the graph of such a step fits beside what is kept, or into the tenant's equal share."""
        self._expire()
        need = self._graph_bytes(segments, span)
        if self.used_bytes + need <= self.budget_bytes:
            return True
        mine = self._tenants.get(tenant)
        others = len(self._tenants) - (mine is not None)
        share = self.budget_bytes // (others + 1)
        return others > 0 and (mine.used_bytes if mine else 0) + need <= share

    def put(self, key: StepKey, kept: Kept) -> None:
        """Keep a step; a step that does not fit is not kept."""
        self.take(key)
        self._expire()
        kept.born_s = self._clock()
        holds = kept.out_ND is not None
        kept.num_bytes = self._graph_bytes(kept.segments, kept.span) if holds else kept.input_bytes
        if kept.num_bytes > self.budget_bytes or not self._make_room(key.tenant, kept.num_bytes):
            return
        held = self._tenants.setdefault(key.tenant, _Held())
        held.steps[key] = kept
        held.used_bytes += kept.num_bytes
        if holds:
            held.graphs[key] = kept
        if len(held.steps) > _MAX_STEPS:
            self.take(next(iter(held.steps)))

    def take(self, key: StepKey) -> Kept | None:
        """Remove and return a step; None when it is not kept."""
        held = self._tenants.get(key.tenant)
        kept = held.steps.pop(key, None) if held is not None else None
        if held is None or kept is None:
            return None
        held.graphs.pop(key, None)
        held.used_bytes -= kept.num_bytes
        if not held.steps:
            del self._tenants[key.tenant]
        return kept

    def discard_session(self, tenant: str, session: str) -> None:
        """Forget all steps of a session that ended."""
        held = self._tenants.get(tenant, _Held())
        for key in [key for key in held.steps if key.session == session]:
            self.take(key)

    def clear(self) -> None:
        """Forget everything."""
        self._tenants.clear()

    def _expire(self) -> None:
        oldest_s = self._clock() - self._lifetime_s
        for held in list(self._tenants.values()):
            while held.steps and next(iter(held.steps.values())).born_s < oldest_s:
                self.take(next(iter(held.steps)))

    def _make_room(self, tenant: str, num_bytes: int) -> bool:
        """Free what `tenant` needs at whoever has the most, with that counted; False when that is itself."""
        while self.used_bytes + num_bytes > self.budget_bytes:
            most = max(
                self._tenants, key=lambda name: self._tenants[name].used_bytes + num_bytes * (name == tenant)
            )
            held = self._tenants[most]
            mine = self._tenants.get(tenant)
            if most != tenant and held.used_bytes < num_bytes + (mine.used_bytes if mine else 0):
                return False
            if held.graphs:
                _, kept = held.graphs.popitem(last=False)
                held.used_bytes -= kept.num_bytes - kept.input_bytes
                kept.out_ND, kept.hidden_ND = None, kept.hidden_ND.detach()
                kept.num_bytes = kept.input_bytes
            else:
                self.take(next(iter(held.steps)))
        return True
