"""What the server makes of a client's reply: its complaint, its costs, and whether it can be used."""

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message

from tightbeam.common.errors import TightbeamError, UpdateRefusedError, error_from_code
from tightbeam.federation.contract.layers import LADDER
from tightbeam.federation.contract.records import from_record, message_bytes
from tightbeam.federation.math import Arrays, LoraAdapter, Update, check_update
from tightbeam.federation.scenario import ClientProfile, Scenario
from tightbeam.federation.server.journal import Row
from tightbeam.federation.server.judging import STATUSES, figures_told, notes_of, said
from tightbeam.federation.server.pricing import read_offer

__all__ = ["Node", "account_of", "cost_of", "failure_of", "masked_of", "spread", "update_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One client as the server knows it."""

    node_id: int
    profile: ClientProfile
    certificate: bytes  # of its identity; empty when the federation is not secure
    layers: LoraAdapter  # names and shapes of what it shares
    below: frozenset[str]  # of them, the layers below its cut


def failure_of(reply: Message) -> TightbeamError | None:
    """What a reply complains about, with its own text; None when it is fine."""
    if reply.has_error():
        return TightbeamError(said(reply.error.reason or "") or f"Flower's error {reply.error.code}.")
    notes = notes_of(reply)
    if notes.get("status") == "ok":
        return None
    if notes.get("status") not in STATUSES:
        return UpdateRefusedError(
            f"Its reply has the status {said(notes.get('status'))}, which there is not."
        )
    return error_from_code(str(notes.get("code", "internal")), said(notes.get("reason", "")), "")


def cost_of(sent: Message) -> Row:
    """Bytes of a message to a client."""
    records = sent.content.array_records
    return {
        "adapter_down_bytes": sum(record.count_bytes() for record in records.values()),
        "message_down_bytes": message_bytes(sent),
        "ladder_down_bytes": _ladder(records["arrays"]).count_bytes(),
        "fold_down_bytes": sum(r.count_bytes() for name, r in records.items() if name == "fold"),
    }


def account_of(scenario: Scenario, client: str, sent: Row, reply: Message, *, trains: bool) -> Row:
    """Status, bytes and figures of one exchange; `sent` is its message's `cost_of`."""
    failure, notes = failure_of(reply), notes_of(reply)
    known = not reply.has_error() and notes.get("status") in STATUSES
    row: Row = {
        "status": str(notes["status"]) if known else "failed" if reply.has_error() else "refused",
        "reason": str(failure) if failure else "",
        **({"code": failure.code} if failure else {}),
        "run": said(notes.get("run", "")),
        "codec": said(notes.get("codec", "")),
        **sent,
        "message_up_bytes": message_bytes(reply),
        "adapter_up_bytes": 0,
    }
    if not known:
        return row
    try:
        if "prices" in notes:
            row["prices"] = read_offer(str(notes["prices"]))
        row |= figures_told(scenario, client, reply, trains=trains)
    except UpdateRefusedError as error:
        return row | {"status": "refused", "reason": str(error)}
    if arrays := reply.content.array_records:
        row["adapter_up_bytes"] = sum(record.count_bytes() for record in arrays.values())
    return row


def _ladder(record: ArrayRecord) -> ArrayRecord:
    """What of it is no adapter."""
    return ArrayRecord({name: array for name, array in record.items() if name.startswith(LADDER)})


def update_of(
    scenario: Scenario, node: Node, trained: LoraAdapter, start: Arrays, reply: Message, weight: float
) -> Update:
    """What a client hands in, checked against what it was to train from `start`.

    Raises:
        UpdateRefusedError: NaN, another shape or another rank; names client and tensor.

    """
    name = node.profile.name
    try:
        given = from_record(reply.content.array_records["arrays"])
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateRefusedError(
            f"The update of {name} is refused: it has no arrays that can be read.",
            cure="The other clients' updates are not affected.",
        ) from error
    if scenario.strategy.name == "ffa":  # A is frozen, so only B comes back
        frozen = {m.names[0] for m in trained.modules.values()}
        given = {tensor: array for tensor, array in start.items() if tensor in frozen} | given
    update = Update(name, weight, given, scenario.adapter.scale)
    found = check_update(update, trained)
    if found.modules and (rank := found.rank) != node.profile.options.r:
        raise UpdateRefusedError(
            f"The update of {name} is refused: it has rank {rank}, not {node.profile.options.r}.",
            cure="The other clients' updates are not affected.",
        )
    return update


def masked_of(client: str, reply: Message) -> bytes:
    """The vector in a secure reply.

    Raises:
        UpdateRefusedError: there is none.

    """
    data = notes_of(reply).get("secure")
    if not isinstance(data, bytes):
        raise UpdateRefusedError(f"The reply of {client} is refused: it has no masked vector.")
    return data


def spread(losses: Mapping[str, tuple[float, int]]) -> dict[str, float | None] | None:
    """Mean by learned tokens, and how the clients differ; None when nobody evaluated."""
    if not losses:
        return None
    mean = sum(loss * count for loss, count in losses.values()) / sum(n for _, n in losses.values())
    by_loss = sorted(loss for loss, _ in losses.values())
    middle = by_loss[len(by_loss) // 2]
    return {"clients": len(losses), "loss": mean, "worst": by_loss[-1], "median": middle, "best": by_loss[0]}
