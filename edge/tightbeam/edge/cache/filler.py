"""Streams samples through the cloud once, several groups in flight, while training goes on with the first.

A group is what one step of the wire carries. Groups are the same however far an earlier run came, so a
sample's activation is the same to the last bit whether it was fetched before or after a kill. Everything runs
on the caller's thread: the bottom is computed when a place in the window is free; the rest is waiting.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from tightbeam.common.backbone import Segments, SegmentTable
from tightbeam.edge.cache.keys import sample_digest
from tightbeam.edge.cache.shortcut import TrunkShortcut
from tightbeam.edge.carrier import Flight

__all__ = ["Filler", "Sample"]

_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """The tokens of one sample; its positions count from 0."""

    input_ids: tuple[int, ...]
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", sample_digest(self.input_ids, range(len(self.input_ids))))


class Filler:
    """Fills the cache of a shortcut with groups of samples, in order.

    Without `whole_groups` samples that are held never cross again, and groups depend on what is held.
    """

    def __init__(
        self,
        shortcut: TrunkShortcut,
        groups: Iterable[Sequence[Sample]],
        *,
        in_flight: int = _IN_FLIGHT,
        whole_groups: bool = True,
    ) -> None:
        assert shortcut.cache is not None
        self._shortcut, self._cache, self._limit = shortcut, shortcut.cache, in_flight
        self._groups = deque(_without_repeats(groups))
        if not whole_groups:
            lacking = ([s for s in group if s.digest not in self._cache] for group in self._groups)
            self._groups = deque(group for group in lacking if group)
        self._waiting = {sample.digest for group in self._groups for sample in group}
        self._flights: deque[tuple[Sequence[Sample], Segments, Flight]] = deque()

    @property
    def done(self) -> bool:
        """Whether there is nothing left to fetch."""
        return not self._groups and not self._flights

    def pump(self) -> None:
        """Take in what has arrived and send as much as the window holds; does not wait."""
        while self._flights and self._flights[0][2].landed:
            self._collect()
        while self._groups and len(self._flights) < self._limit and not self._cache.full:
            self._launch(self._groups.popleft())
        if self._cache.full:
            self._groups.clear()

    def ensure(self, digests: Iterable[bytes]) -> None:
        """Wait until these samples were fetched, if they are among the groups."""
        wanted = set(digests)
        self.pump()
        while not self.done and any(d in self._waiting for d in wanted):
            if self._flights:
                self._collect()
            self.pump()

    def finish(self) -> None:
        """Wait for everything."""
        self.ensure(set(self._waiting))

    def settle(self) -> bool:
        """Wait for what is on its way, and send no more; says whether there was anything."""
        waited = bool(self._flights)
        while self._flights:
            self._collect()
        return waited

    def _launch(self, group: Sequence[Sample]) -> None:
        if all(sample.digest in self._cache for sample in group):
            self._waiting.difference_update(sample.digest for sample in group)
            return
        lengths = tuple(len(sample.input_ids) for sample in group)
        segments = Segments(lengths, torch.cat([torch.arange(n) for n in lengths]))
        parts = self._shortcut.parts
        ids_N = torch.tensor([token for sample in group for token in sample.input_ids])
        hidden_ND, seen = self._shortcut.cut_activations(
            input_ids=ids_N[None].to(parts.device),
            position_ids=segments.positions_N[None].to(parts.device),
            segments=SegmentTable(segments, parts.device),
        )
        assert seen.lengths == lengths
        flight = parts.trunk.stepper.submit(hidden_ND, segments, input_ids_N=ids_N)
        self._flights.append((group, segments, flight))

    def _collect(self) -> None:
        group, segments, flight = self._flights.popleft()
        answer = self._shortcut.parts.trunk.stepper.collect(flight)
        self._shortcut.keep(answer, segments, [sample.digest for sample in group])
        self._waiting.difference_update(sample.digest for sample in group)


def _without_repeats(groups: Iterable[Sequence[Sample]]) -> list[list[Sample]]:
    """Each content once, where it comes first."""
    seen: set[bytes] = set()
    found = []
    for group in groups:
        fresh = []
        for sample in group:
            if sample.digest not in seen:
                seen.add(sample.digest)
                fresh.append(sample)
        if fresh:
            found.append(fresh)
    return found
