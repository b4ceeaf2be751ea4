"""The public terms of one round, which every client checks before it takes part."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from struct import Struct
from typing import Self

from tightbeam.common.errors import CohortError, FederationError
from tightbeam.federation.secagg.fixed_point import FixedPoint
from tightbeam.federation.secagg.framing import Message, join, names_of, split

__all__ = ["Plan"]

_NUMBERS = Struct(">qqqqdqqqq")


@dataclass(frozen=True, slots=True)
class Plan(Message):
    """The public terms of one round. Its digest goes into every key, seal and signature of the round."""

    kind = "plan"
    federation: str  # keeps two federations with the same clients apart
    round: int
    model_sha256: bytes  # of the global adapter that this round starts from, and what is done with it
    terms_sha256: bytes  # of everything else that shapes what a client computes
    participants: tuple[str, ...]  # sorted; who is asked
    threshold: int  # shares that recover a secret
    min_cohort: int  # fewest clients in a sum
    size: int  # values per vector, without the weight
    encoding: FixedPoint

    def __post_init__(self) -> None:
        count = len(self.participants)
        majority = count // 2 + 1
        if not majority <= self.threshold <= count:
            raise FederationError(
                f"A threshold of {self.threshold} for {count} clients is not possible.",
                cure=f"Take {majority} to {count}: below a majority, two halves could unmask different sums.",
            )
        if not 2 <= self.min_cohort <= count or self.encoding.max_clients < count:
            raise FederationError(
                f"A cohort of at least {self.min_cohort} of {count} clients, encoded for "
                f"{self.encoding.max_clients}, is not possible.",
                cure="The minimum is at least 2, and the encoding must have room for all clients.",
            )
        whole = len(self.model_sha256) == len(self.terms_sha256) == 32
        if list(self.participants) != sorted(set(self.participants)) or not whole:
            raise FederationError("A plan's participants are sorted, each once, and its digests are SHA-256.")

    @property
    def digest(self) -> bytes:
        """SHA-256 of the plan."""
        return hashlib.sha256(self.to_bytes()).digest()

    @property
    def quorum(self) -> int:
        """Fewest clients with which the round may go on."""
        return max(self.threshold, self.min_cohort)

    def require(self, names: Collection[str], least: int, did: str) -> None:
        """Raise CohortError unless `least` clients did what the message says."""
        if len(names) < least:
            raise CohortError(
                f"Only {len(names)} of {len(self.participants)} clients {did}, and {least} are needed.",
                cure="Run the round again with the clients that are up.",
            )

    def point(self, name: str) -> int:
        """Where a client's Shamir shares are evaluated: 1, 2, 3, ..."""
        return self.participants.index(name) + 1

    @property
    def vector_bytes(self) -> int:
        """Length of a masked vector."""
        return (self.size + 1) * self.encoding.ring_bits // 8

    def _fields(self) -> list[bytes]:
        e = self.encoding
        encoding = (e.clip, e.fraction_bits, e.max_weight, e.max_clients, e.ring_bits)
        names = join(name.encode() for name in self.participants)
        packed = _NUMBERS.pack(self.round, self.threshold, self.min_cohort, self.size, *encoding)
        return [self.federation.encode(), self.model_sha256, self.terms_sha256, names, packed]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        federation, model, terms, names, packed = values
        number, threshold, cohort, size, *encoding = _NUMBERS.unpack(packed)
        everyone, fixed_point = names_of(split(names)), FixedPoint(*encoding)
        begin = federation.decode(), number, model, terms
        return cls(*begin, everyone, threshold, cohort, size, fixed_point)
