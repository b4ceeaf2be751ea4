"""A client's side of secure aggregation over Flower's messages: its exchanges, and its masked work.

The protocol is `tightbeam.federation.secagg`; here its bytes travel. A client keeps its state between the
exchanges in Flower's context, which never leaves the node.

The server delivers the clients' certificates, and each client checks against its own authority who issued
them: a server cannot make up clients. Nor can it ask each for something else, and read from the sum who moved
where: see `contract.terms`. Which adapters it has answered, a client knows from a folder of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict

from tightbeam.common.errors import IdentityError, ProtocolError, UsageError
from tightbeam.common.identity.identities import Identity, load_identity
from tightbeam.federation.client.answered import AnsweredFolder
from tightbeam.federation.client.clipping import private_update
from tightbeam.federation.client.participant import Client
from tightbeam.federation.contract.messages import HIDDEN
from tightbeam.federation.contract.records import from_record
from tightbeam.federation.contract.terms import Arrays, Purpose, require_agreed, with_loss
from tightbeam.federation.secagg import Layout, SecAggClient
from tightbeam.federation.secagg.keys import roster_from

__all__ = ["SecureTask", "answer_step", "certificate_of", "shown"]

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
    own, folder = client.node_config.get("identity"), client.run_config.identities
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
        values = with_loss(arrays, loss)
        flat = Layout.of(values).flatten(values, self.client.profile.name)
        masked = ours.mask(inbox, flat, weight)
        _store(self.context, ours, kept["certificates"])
        return masked


def shown(metrics: Mapping[str, int | float], *, secure: bool) -> MetricRecord:
    """The figures of a reply; in a secure one without those that only the sum may tell."""
    return MetricRecord({n: value for n, value in metrics.items() if not (secure and n in HIDDEN)})


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
