"""The server's side of secure aggregation over Flower's messages: it gets a sum of adapters and no adapter.

The protocol is `tightbeam.federation.secagg`; here its bytes travel. Two exchanges come before the
work (keys, shares), the masked vector comes with the work's own reply, and two follow (consent, unmask).

What is summed is the trained adapter and, beside it, the loss; an evaluation sums its loss alone. Weights go
into the sum too. Of a single client the server sees what the cloud's ledger has anyway: bytes, tokens,
operations, and what the scenario's profiles make of them. The clients' side is `client.secure`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from tightbeam.common.errors import (
    CohortError,
    FederationError,
    IntegrityError,
    ProtocolError,
    TightbeamError,
)
from tightbeam.federation.contract.records import from_record, message_bytes
from tightbeam.federation.contract.terms import Purpose, plan_of, with_loss, without_loss
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.secagg import Layout, Plan, SecAggServer
from tightbeam.federation.server.combining import trained_part
from tightbeam.federation.server.exchange import exchange
from tightbeam.federation.server.judging import notes_of, said

__all__ = ["Opened", "SecureRounds", "SecureSum"]


@dataclass(frozen=True, slots=True)
class Opened:
    """What the first two exchanges gave: what each client works with, and who did not come that far."""

    inboxes: Mapping[str, bytes]
    failures: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class SecureSum:
    """All that the server learns of a round's clients."""

    mean: dict[str, NDArray[np.float64]]  # of the trained arrays, each client by its weight; none evaluating
    loss: float  # the same mean
    weight: int  # of all together
    survivors: tuple[str, ...]


class SecureRounds:
    """The server's side, one round after the other."""

    def __init__(self, scenario: Scenario, backbone: str) -> None:
        self._scenario, self._backbone = scenario, backbone
        self._node_ids: dict[str, int] = {}
        self._certificates: dict[str, bytes] = {}
        self._roster: dict[str, Ed25519PublicKey] = {}
        self.moved_bytes = 0  # of the exchanges besides the work, for this sum

    def admit(self, name: str, node_id: int, certificate: bytes) -> None:
        """Let a client in. Whether the authority issued the certificate is for the clients to judge."""
        self._node_ids[name], self._certificates[name] = node_id, certificate
        self._roster[name] = _public_key(name, certificate)

    def open(
        self,
        number: int,
        purpose: Purpose,
        sent: ArrayRecord,
        names: Sequence[str],
        grid: Grid,
        frozen: Collection[str] = (),
    ) -> Opened:
        """Agree on keys and shares with the clients that are to work; nobody trains `frozen` layers.

        Raises:
            CohortError: too few of them answer.
            FederationError: there are fewer than can hide each other.

        """
        self._grid, self._failures, self.moved_bytes = grid, dict[str, str](), 0
        self._server = SecAggServer(self._plan(number, purpose, sent, sorted(names), frozen), self._roster)
        self._exchange("join", self._server.open())
        try:
            self._exchange("share", self._server.advance())
            return Opened(self._server.advance(), self._failures)
        except CohortError as error:
            said = "; ".join(f"{name} says: {reason}" for name, reason in self._failures.items())
            raise CohortError(f"{error.message} {said}", cure="Correct what they say.") from error

    def close(self, masked: Mapping[str, bytes]) -> SecureSum:
        """The weighted mean of those whose masked vectors came.

        Raises:
            CohortError: too few came, or agreed to unmask; or a client dealt shares that do not open.

        """
        for name, vector in sorted(masked.items()):
            self._receive(name, vector)
        self._exchange("consent", self._server.advance())
        self._exchange("unmask", self._server.advance())
        try:
            total = self._server.finish()
        except (IntegrityError, ProtocolError) as error:
            raise CohortError(f"There is no sum: {error.message}", cure=error.cure) from error
        mean, loss = without_loss(self._layout.unflatten(total.mean))
        return SecureSum(mean, loss, total.weight, self._server.survivors)

    @property
    def failures(self) -> dict[str, str]:
        """Who failed in an exchange of this round, and how."""
        return dict(self._failures)

    def _plan(
        self, number: int, purpose: Purpose, sent: ArrayRecord, names: list[str], frozen: Collection[str]
    ) -> Plan:
        section = self._scenario.strategy
        if len(names) < section.min_cohort:
            raise FederationError(
                f"A secure round needs {section.min_cohort} clients or more, not {len(names)}.",
                cure="Raise sample, or set strategy.secure to false.",
            )
        arrays = from_record(sent)
        trained = trained_part(arrays, self._scenario, frozen) if purpose == "train" else {}
        self._layout = Layout.of(with_loss(trained, 0.0))
        return plan_of(self._scenario, self._backbone, purpose, number, arrays, names, self._layout.size)

    def _exchange(self, step: str, messages: Mapping[str, bytes]) -> None:
        """Send each client its bytes and take in what comes back; who fails has dropped out."""
        outgoing = []
        for name, data in messages.items():
            values: dict[str, Any] = {"step": step, "message": data}
            if step == "join":
                values["certificates"] = [self._certificates[name] for name in self._server.plan.participants]
            content = RecordDict({"secure": ConfigRecord(values)})
            outgoing.append(Message(content, self._node_ids[name], "query.secure"))
        self.moved_bytes += sum(map(message_bytes, outgoing))
        by_id = {node_id: name for name, node_id in self._node_ids.items()}
        for reply in exchange(self._grid, outgoing):
            self.moved_bytes += message_bytes(reply)
            self._take(by_id[reply.metadata.src_node_id], reply)

    def _take(self, name: str, reply: Message) -> None:
        notes = notes_of(reply)
        data = notes.get("secure")
        if not isinstance(data, bytes):
            reason = said(reply.error.reason if reply.has_error() else notes.get("reason"))
            self._failures[name] = str(reason)
            return
        self._receive(name, data)

    def _receive(self, name: str, data: bytes) -> None:
        try:
            self._server.receive(name, data)
        except TightbeamError as error:
            self._failures[name] = str(error)


def _public_key(name: str, certificate_der: bytes) -> Ed25519PublicKey:
    try:
        key = x509.load_der_x509_certificate(certificate_der).public_key()
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise FederationError(
            f"{name} shows no certificate of an identity.", cure="Give it one of `tightbeam certs init`."
        )
    return key
