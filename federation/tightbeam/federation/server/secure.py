"""Secure aggregation over Flower's messages: the server gets the sum of the adapters and no adapter.

The protocol is `tightbeam.federation.secagg`; here its bytes travel. Two exchanges come before the
work (keys, shares), the masked vector comes with the work's own reply, and two follow (consent, unmask). A
client keeps its state between them in Flower's context, which never leaves the node.

What is summed is the trained adapter and, beside it, the loss; an evaluation sums its loss alone. Weights go
into the sum too. Of a single client the server sees what the cloud's ledger has anyway: bytes, tokens,
operations, and what the scenario's profiles make of them.

The server delivers the clients' certificates, and each client checks against its own authority who issued
them: a server cannot make up clients. Nor can it ask each for something else, and read from the sum who moved
where: see `terms`. Which adapters it has answered, a client knows from a folder of its own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from tightbeam.common.errors import (
    CohortError,
    FederationError,
    IdentityError,
    IntegrityError,
    ProtocolError,
    TightbeamError,
    UsageError,
)
from tightbeam.common.identity.identities import Identity, load_identity
from tightbeam.federation.client.answered import AnsweredFolder
from tightbeam.federation.client.participant import Client
from tightbeam.federation.runtimes.grid import message_bytes
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.secagg import Layout, Plan, SecAggClient, SecAggServer
from tightbeam.federation.secagg.keys import roster_from
from tightbeam.federation.server.combining import trained_part
from tightbeam.federation.server.exchange import exchange
from tightbeam.federation.server.global_adapter import from_record
from tightbeam.federation.server.judging import HIDDEN, notes_of, said
from tightbeam.federation.server.privacy import private_update
from tightbeam.federation.server.terms import CLIP, Arrays, Purpose, plan_of, require_agreed

__all__ = [
    "Opened",
    "Purpose",
    "SecureRounds",
    "SecureSum",
    "SecureTask",
    "answer_step",
    "certificate_of",
    "shown",
]

_LOSS, _LARGEST_LOSS = "loss", 64.0  # nats; a loss beyond it counts as it
_STATE = "secagg"
_STEPS = {
    "join": SecAggClient.join,
    "share": SecAggClient.share,
    "consent": SecAggClient.consent,
    "unmask": SecAggClient.unmask,
}


def _identity_of(client: Client) -> Identity:
    """The client's own identity.

    Raises:
        UsageError: it has none.
        IdentityError: it is another client's.

    """
    own, folder = client.node_config.get("identity"), client.settings.identities
    if own is None and folder is None:
        raise UsageError(
            "strategy.secure needs identities: who is insecure cannot sign keys.",
            cure="Leave cloud.address out, or set cloud.identities.",
        )
    name = client.profile.name
    identity = load_identity(Path(str(own)) if own is not None else Path(str(folder)) / name)
    if identity.name != name:
        raise IdentityError(
            f"{name} has the identity of {identity.name}.",
            cure="Give the node its own identity, or the partition-id of that client.",
        )
    return identity


def certificate_of(client: Client) -> bytes:
    """What the client shows to the others; empty when the federation is not secure."""
    return _identity_of(client).certificate_der if client.scenario.strategy.secure else b""


def answer_step(client: Client, context: Context, content: RecordDict) -> bytes:
    """Answer one of the four exchanges that go beside the work.

    Raises:
        ProtocolError: any other step; of `SecAggClient` the server may ask for these and for nothing else.

    """
    config = content.config_records["secure"]
    step, message = str(config["step"]), config["message"]
    if step not in _STEPS or not isinstance(message, bytes):
        raise ProtocolError(f"{client.profile.name} was asked for the step {step!r}, which there is not.")
    kept = context.state.config_records.get(_STATE) or ConfigRecord({"state": b""})
    state, certificates = kept["state"], config["certificates"] if step == "join" else kept["certificates"]
    ours = _restored(client, certificates, state, anew=step == "join")
    reply = _STEPS[step](ours, message)
    _store(context, ours, certificates)
    return reply


@dataclass(frozen=True, slots=True)
class SecureTask:
    """The work that a client was asked for in a secure round, once it is what its whole cohort agreed on."""

    client: Client
    context: Context
    content: RecordDict

    @classmethod
    def of(
        cls, client: Client, context: Context, content: RecordDict, purpose: Purpose, backbone: str
    ) -> Self:
        """Check it, before anything is computed.

        Raises:
            ProtocolError: it is something else than the plan says.

        """
        if "secure" not in content.config_records or _STATE not in context.state.config_records:
            raise ProtocolError(f"{client.profile.name} was asked for work outside of a secure round.")
        kept, name = context.state.config_records[_STATE], client.profile.name
        plan = _restored(client, kept["certificates"], kept["state"]).plan
        require_agreed(name, plan, client.scenario, backbone, purpose, content)
        return cls(client, context, content)

    def masked(self, arrays: Arrays, weight: int, loss: float) -> bytes:
        """Hide what the client trained, and its loss, under this round's masks.

        Raises:
            UpdateRefusedError: NaN, infinity or values that the encoding cannot hold; names the tensor.

        """
        kept = self.context.state.config_records[_STATE]
        inbox = self.content.config_records["secure"]["inbox"]
        assert isinstance(inbox, bytes)
        ours = _restored(self.client, kept["certificates"], kept["state"])
        privacy = self.client.scenario.strategy.privacy
        if arrays and privacy is not None:
            start = from_record(self.content.array_records["arrays"])
            arrays = private_update(privacy, arrays, start, ours.plan.quorum)
        values = _with_loss(arrays, loss)
        flat = Layout.of(values).flatten(values, self.client.profile.name)
        masked = ours.mask(inbox, flat, weight)
        _store(self.context, ours, kept["certificates"])
        return masked


def shown(metrics: Mapping[str, int | float], *, secure: bool) -> MetricRecord:
    """The figures of a reply; in a secure one without those that only the sum may tell."""
    return MetricRecord({n: value for n, value in metrics.items() if not (secure and n in HIDDEN)})


def _with_loss(arrays: Arrays, loss: float) -> dict[str, NDArray[Any]]:
    """The loss as one more value, in a unit that fits the encoding."""
    return {**arrays, _LOSS: np.array([min(loss, _LARGEST_LOSS) * CLIP / _LARGEST_LOSS])}


def _restored(client: Client, certificates: object, state: object, *, anew: bool = False) -> SecAggClient:
    identity = _identity_of(client)
    assert isinstance(certificates, list)
    assert isinstance(state, bytes)
    roster = roster_from([one for one in certificates if isinstance(one, bytes)], identity.trust)
    least, answered = client.scenario.strategy.min_cohort, AnsweredFolder(client.answered)
    ours = SecAggClient(
        client.profile.name, identity.signing_key, roster, min_cohort=least, answered=answered
    )
    if not state:
        return ours
    return ours.restore_number(state) if anew else ours.restore(state)


def _store(context: Context, ours: SecAggClient, certificates: Any) -> None:
    context.state.config_records[_STATE] = ConfigRecord(
        {"state": ours.state(), "certificates": list(certificates)}
    )


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
        mean = self._layout.unflatten(total.mean)
        loss = float(mean.pop(_LOSS)[0]) * _LARGEST_LOSS / CLIP
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
        self._layout = Layout.of(_with_loss(trained, 0.0))
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
