"""Streams samples through the cloud once, several groups in flight, while training goes on with the first.

A group is what one step of the wire carries: batches, in the order in which they are needed, as long as they
are not too many tokens. The more samples it holds, the more of their leading rows are common to several and
cross once. What is held never crosses again. The cache keeps a group as a whole or not at all, so after a
kill the rest falls into the same groups, and a sample's activation is the same to the last bit whether it was
fetched before or after. Everything runs on the caller's thread: the bottom is computed when a place in the
window is free; the rest is waiting.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tightbeam.common.backbone import Segments
from tightbeam.edge.cache.keys import sample_digest
from tightbeam.edge.cache.shortcut import TrunkShortcut
from tightbeam.edge.link.carrier import Flight
from tightbeam.edge.model.packed_rows import PackedRows

__all__ = ["Filler", "Pass", "Sample"]

_IN_FLIGHT = 4
_GROUP_TOKENS = 2048  # in a step with several batches: rows in common gain little more, a trunk is busy


@dataclass(frozen=True, slots=True)
class Sample:
    """The tokens of one sample; its positions count from 0."""

    input_ids: tuple[int, ...]
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", sample_digest(self.input_ids, range(len(self.input_ids))))


@dataclass(frozen=True, slots=True)
class Pass:
    """What is to cross in order to fill a cache."""

    num_rows: int  # of as many tokens, or of more that share them
    num_samples: int
    num_steps: int


class Filler:
    """Fills the cache of a shortcut with batches of samples, in order."""

    def __init__(
        self,
        shortcut: TrunkShortcut,
        batches: Iterable[Sequence[Sample]],
        *,
        in_flight: int = _IN_FLIGHT,
    ) -> None:
        assert shortcut.cache is not None
        self._shortcut, self._cache, self._limit = shortcut, shortcut.cache, in_flight
        limit = min(_GROUP_TOKENS, shortcut.parts.trunk.stepper.max_tokens_per_step)
        lacking = ([s for s in batch if s.digest not in self._cache] for batch in _without_repeats(batches))
        self._groups = deque(_joined(lacking, limit))
        self._waiting = {sample.digest for group in self._groups for sample in group}
        self._flights: deque[tuple[Sequence[Sample], Segments, Flight]] = deque()

    @property
    def done(self) -> bool:
        """Whether there is nothing left to fetch."""
        return not self._groups and not self._flights

    @property
    def groups(self) -> Sequence[Sequence[Sample]]:
        """What is still to be sent."""
        return self._groups

    @property
    def ahead(self) -> Pass:
        """What has not been sent yet."""
        stepper, num_rows = self._shortcut.parts.trunk.stepper, 0
        for group in self._groups:
            lengths = tuple(len(sample.input_ids) for sample in group)
            segments = Segments(lengths, torch.cat([torch.arange(n) for n in lengths]))
            ids_N = torch.tensor([token for sample in group for token in sample.input_ids])
            prefixes = stepper.shared_prefixes(ids_N, segments)
            num_rows += segments.num_tokens if prefixes is None else prefixes.num_rows
        return Pass(num_rows, sum(map(len, self._groups)), len(self._groups))

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
        parts = self._shortcut.parts
        rows = PackedRows.of_samples((sample.input_ids for sample in group), parts.device)
        hidden_ND, _ = self._shortcut.cut_activations(**rows.inputs())
        flight = parts.trunk.stepper.submit(hidden_ND, rows.segments, input_ids_N=rows.input_ids_N)
        self._flights.append((group, rows.segments, flight))

    def _collect(self) -> None:
        group, segments, flight = self._flights.popleft()
        answer = self._shortcut.parts.trunk.stepper.collect(flight)
        self._shortcut.keep(answer, segments, [sample.digest for sample in group])
        self._waiting.difference_update(sample.digest for sample in group)


def _without_repeats(batches: Iterable[Sequence[Sample]]) -> Iterator[list[Sample]]:
    """Each content once, where it comes first."""
    seen: set[bytes] = set()
    for batch in batches:
        fresh = []
        for sample in batch:
            if sample.digest not in seen:
                seen.add(sample.digest)
                fresh.append(sample)
        yield fresh


def _joined(batches: Iterable[list[Sample]], max_tokens: int) -> Iterator[list[Sample]]:
    """Batches that follow each other, while they are no more than so many tokens; one alone may be more."""
    group: list[Sample] = []
    for batch in batches:
        if group and _num_tokens(group) + _num_tokens(batch) > max_tokens:
            yield group
            group = []
        group = group + batch
    if group:
        yield group


def _num_tokens(samples: Iterable[Sample]) -> int:
    return sum(len(sample.input_ids) for sample in samples)
