"""Secure aggregation over Flower's messages: the server gets the sum of the adapters and no adapter.

The protocol is `tightbeam.common.federation.secagg`; here its bytes travel. Two exchanges come before
training (keys, shares), the masked adapter comes with the training's reply, and two follow (consent, unmask).
A client keeps its state between them in Flower's context, which never leaves the node.

The server delivers the clients' certificates, and each client checks against its own authority who issued
them: a server cannot make up clients. What still travels in the open are figures: losses, tokens, bytes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from tightbeam.common.errors import CohortError, FederationError, TightbeamError, UsageError
from tightbeam.common.federation.secagg import FixedPoint, Layout, Plan, SecAggClient, SecAggServer
from tightbeam.common.federation.secagg.keys import roster_from
from tightbeam.common.identity import Identity, load_identity
from tightbeam.simulations.apps.participant import Client
from tightbeam.simulations.global_adapter import from_record
from tightbeam.simulations.grid import message_bytes
from tightbeam.simulations.scenario import Scenario

__all__ = ["Opened", "SecureRounds", "answer_step", "certificate_of", "mask_update"]

_CLIP = 8.0  # adapters' values are far below; one beyond it is refused, not clipped
_MAX_WEIGHT = 2**20  # examples or tokens of one client
_MIN_COHORT = 3
_STATE = "secagg"


def _identity_of(client: Client) -> Identity:
    """The client's own identity.

    Raises:
        UsageError: it has none.

    """
    own, folder = client.node_config.get("identity"), client.settings.identities
    if own is None and folder is None:
        raise UsageError(
            "strategy.secure needs identities: who is insecure cannot sign keys.",
            cure="Leave cloud.address out, or set cloud.identities.",
        )
    return load_identity(Path(str(own)) if own is not None else Path(str(folder)) / client.profile.name)


def certificate_of(client: Client) -> bytes:
    """What the client shows to the others; empty when the federation is not secure."""
    return _identity_of(client).certificate_der if client.scenario.strategy.secure else b""


def answer_step(client: Client, context: Context, content: RecordDict) -> bytes:
    """Answer one of the four exchanges that are no training."""
    config = content.config_records["secure"]
    step, message = str(config["step"]), config["message"]
    assert isinstance(message, bytes)
    kept = context.state.config_records.get(_STATE) or ConfigRecord({"state": b""})
    state, certificates = kept["state"], config["certificates"] if step == "join" else kept["certificates"]
    ours = _restored(client, certificates, state)
    reply: bytes = getattr(ours, step)(message)
    _store(context, ours, certificates)
    return reply


def mask_update(
    client: Client, context: Context, inbox: bytes, arrays: Mapping[str, NDArray[Any]], weight: int
) -> bytes:
    """Hide a trained adapter under this round's masks."""
    kept = context.state.config_records[_STATE]
    ours = _restored(client, kept["certificates"], kept["state"])
    layout = Layout.of(arrays)
    masked = ours.mask(inbox, layout.flatten(arrays, client.profile.name), weight)
    _store(context, ours, kept["certificates"])
    return masked


def _restored(client: Client, certificates: object, state: object) -> SecAggClient:
    identity = _identity_of(client)
    assert isinstance(certificates, list)
    assert isinstance(state, bytes)
    roster = roster_from([one for one in certificates if isinstance(one, bytes)], identity.trust)
    ours = SecAggClient(client.profile.name, identity.signing_key, roster, min_cohort=_MIN_COHORT)
    return ours.restore(state) if state else ours


def _store(context: Context, ours: SecAggClient, certificates: Any) -> None:
    context.state.config_records[_STATE] = ConfigRecord(
        {"state": ours.state(), "certificates": list(certificates)}
    )


@dataclass(frozen=True, slots=True)
class Opened:
    """What the first two exchanges gave: what each client trains with, and who did not come that far."""

    inboxes: Mapping[str, bytes]
    failures: Mapping[str, str]


class SecureRounds:
    """The server's side, one round after the other."""

    def __init__(
        self, scenario: Scenario, node_ids: Mapping[str, int], certificates: Mapping[str, bytes]
    ) -> None:
        self._scenario, self._node_ids = scenario, dict(node_ids)
        self._certificates = list(certificates.values())
        # Whether the authority issued them is for the clients to judge: they are who must be protected.
        self._roster = {name: _public_key(der) for name, der in certificates.items()}
        self.moved_bytes = 0  # of the exchanges that are no training, this round

    def open(self, number: int, sent: ArrayRecord, names: Sequence[str], grid: Grid) -> Opened:
        """Agree on keys and shares with the sampled clients.

        Raises:
            CohortError: too few of them answer.
            FederationError: fewer are sampled than can hide each other.

        """
        self._grid, self._failures, self.moved_bytes = grid, dict[str, str](), 0
        self._server = SecAggServer(self._plan(number, sent, sorted(names)), self._roster)
        self._exchange("join", self._server.open())
        try:
            self._exchange("share", self._server.advance())
            return Opened(self._server.advance(), self._failures)
        except CohortError as error:
            said = "; ".join(f"{name} says: {reason}" for name, reason in self._failures.items())
            raise CohortError(f"{error.message} {said}", cure="Correct what they say.") from error

    def close(self, masked: Mapping[str, bytes]) -> dict[str, NDArray[np.float32]]:
        """The weighted mean of those whose masked adapters came.

        Raises:
            CohortError: too few came, or agreed to unmask.

        """
        for name, vector in sorted(masked.items()):
            self._server.receive(name, vector)
        self._exchange("consent", self._server.advance())
        self._exchange("unmask", self._server.advance())
        return self._layout.unflatten(self._server.finish().mean)

    @property
    def failures(self) -> dict[str, str]:
        """Who failed in an exchange of this round, and how."""
        return dict(self._failures)

    def _plan(self, number: int, sent: ArrayRecord, names: list[str]) -> Plan:
        if len(names) < _MIN_COHORT:
            raise FederationError(
                f"A secure round needs {_MIN_COHORT} clients or more, not {len(names)}.",
                cure="Raise sample, or set strategy.secure to false.",
            )
        arrays = from_record(sent)
        trained = {
            n: a for n, a in arrays.items() if self._scenario.strategy.name != "ffa" or ".lora_B." in n
        }
        self._layout = Layout.of(trained)
        digest = hashlib.sha256()
        for name in sorted(arrays):
            digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
        return Plan(
            federation=self._scenario.output.name,
            round=number,
            model_sha256=digest.digest(),
            participants=tuple(names),
            threshold=max(len(names) * 2 // 3, len(names) // 2 + 1),
            min_cohort=_MIN_COHORT,
            size=self._layout.size,
            encoding=FixedPoint.fitting(_CLIP, _MAX_WEIGHT, len(names)),
        )

    def _exchange(self, step: str, messages: Mapping[str, bytes]) -> None:
        """Send each client its bytes and take in what comes back; who fails has dropped out."""
        outgoing = []
        for name, data in messages.items():
            values: dict[str, Any] = {"step": step, "message": data}
            if step == "join":
                values["certificates"] = self._certificates
            content = RecordDict({"secure": ConfigRecord(values)})
            outgoing.append(Message(content, self._node_ids[name], "query.secure"))
        self.moved_bytes += sum(map(message_bytes, outgoing))
        by_id = {node_id: name for name, node_id in self._node_ids.items()}
        for reply in self._grid.send_and_receive(outgoing):
            self.moved_bytes += message_bytes(reply)
            self._take(by_id[reply.metadata.src_node_id], reply)

    def _take(self, name: str, reply: Message) -> None:
        notes = reply.content.config_records["notes"] if reply.has_content() else {}
        data = notes.get("secure")
        if not isinstance(data, bytes):
            reason = notes.get("reason") if notes else reply.error.reason
            self._failures[name] = str(reason)
            return
        try:
            self._server.receive(name, data)
        except TightbeamError as error:
            self._failures[name] = str(error)


def _public_key(certificate_der: bytes) -> Ed25519PublicKey:
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    assert isinstance(key, Ed25519PublicKey), "identities are Ed25519"
    return key
