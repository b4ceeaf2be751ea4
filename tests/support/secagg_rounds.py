"""Whole rounds of secure aggregation in memory, with clients that drop out where a test wants them to."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from tightbeam.federation.secagg import (
    Answered,
    FixedPoint,
    Plan,
    SecAggClient,
    SecAggServer,
    WeightedSum,
)
from tightbeam.federation.secagg.masks import ring_dtype

EXCHANGES = ("keys", "shares", "masked", "consent", "unmask")
NEVER = len(EXCHANGES)

Tamper = Callable[[str, str, bytes], bytes]


def seeded(seed: int) -> Callable[[int], bytes]:
    """Entropy that a test can repeat; never the same bytes twice."""
    stream = np.random.default_rng(seed)
    return lambda count: stream.bytes(count)


def names(count: int) -> list[str]:
    return [f"client-{number:03d}" for number in range(count)]


def identity_of(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def make_plan(count: int = 5, *, size: int = 40, ring_bits: int = 64, **changes: Any) -> Plan:
    terms: dict[str, Any] = {
        "federation": "clinics",
        "round": 1,
        "model_sha256": hashlib.sha256(b"adapter").digest(),
        "terms_sha256": hashlib.sha256(b"scenario").digest(),
        "participants": tuple(names(count)),
        "threshold": count // 2 + 1,
        "min_cohort": 2,
        "size": size,
        "encoding": FixedPoint.fitting(8.0, 1000, count, ring_bits),
    }
    return Plan(**(terms | changes))


@dataclass
class Round:
    """A server, its clients, and everything that the server sent and got."""

    plan: Plan
    seed: int = 0
    min_cohort: int = 2
    answered: Callable[[str], Answered] = lambda name: {}  # by a client's name
    tamper_up: Tamper = lambda exchange, client, data: data
    tamper_down: Tamper = lambda exchange, client, data: data
    clients: dict[str, SecAggClient] = field(init=False)
    server: SecAggServer = field(init=False)
    replies: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (exchange, client)
    sent: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        everyone = self.plan.participants
        self.roster = {name: identity_of(name).public_key() for name in everyone}
        self.server = SecAggServer(self.plan, self.roster)
        self.clients = {
            name: SecAggClient(
                name,
                identity_of(name),
                self.roster,
                min_cohort=self.min_cohort,
                answered=self.answered(name),
                entropy=seeded(self.seed * 1000 + number),
            )
            for number, name in enumerate(everyone)
        }

    def values(self, name: str) -> NDArray[np.float64]:
        number = self.plan.participants.index(name)
        return np.random.default_rng(number).uniform(-8, 8, self.plan.size)

    def weight(self, name: str) -> int:
        return 1 + self.plan.participants.index(name)

    def reply(
        self, exchange: str, name: str, message: bytes, inputs: Mapping[str, NDArray[np.float64]]
    ) -> bytes:
        client = self.clients[name]
        if exchange == "masked":
            return client.mask(message, inputs[name], self.weight(name))
        steps = {
            "keys": client.join,
            "shares": client.share,
            "consent": client.consent,
            "unmask": client.unmask,
        }
        return steps[exchange](message)

    def plain_sum(self) -> WeightedSum:
        """The same fixed-point sum of the survivors without any protocol."""
        encoding = self.plan.encoding
        total = np.zeros(self.plan.size + 1, ring_dtype(encoding.ring_bits))
        for name in self.server.survivors:
            total += encoding.encode(self.values(name), self.weight(name), name)
        return encoding.decode(total)

    def assert_exact(self) -> None:
        """Unmask, and hold the sum against `plain_sum`, bit by bit."""
        result, expected = self.server.finish(), self.plain_sum()
        np.testing.assert_array_equal(result.total, expected.total)
        assert result.weight == expected.weight

    def run(
        self,
        drops: Mapping[str, int] | None = None,
        inputs: Mapping[str, NDArray[np.float64]] | None = None,
        until: str = "unmask",
    ) -> SecAggServer:
        """Run the exchanges up to `until`; a client that drops out at n answers the first n exchanges."""
        drops = drops or {}
        inputs = inputs or {name: self.values(name) for name in self.plan.participants}
        for number, exchange in enumerate(EXCHANGES):
            messages = self.server.open() if number == 0 else self.server.advance()
            for name, message in messages.items():
                if drops.get(name, NEVER) > number:
                    self.sent[exchange, name] = self.tamper_down(exchange, name, message)
                    reply = self.reply(exchange, name, self.sent[exchange, name], inputs)
                    self.replies[exchange, name] = self.tamper_up(exchange, name, reply)
                    self.server.receive(name, self.replies[exchange, name])
            if exchange == until:
                break
        return self.server
