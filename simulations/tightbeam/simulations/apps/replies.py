"""What the server makes of a client's reply: its complaint, its costs, and whether it can be used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message

from tightbeam.common.errors import TightbeamError, UpdateRefusedError, error_from_code
from tightbeam.common.federation import LoraAdapter, Update, check_update
from tightbeam.edge.federation import LADDER
from tightbeam.simulations.global_adapter import from_record
from tightbeam.simulations.grid import message_bytes
from tightbeam.simulations.journal import Row
from tightbeam.simulations.scenario import ClientProfile, Scenario

__all__ = ["Node", "account_of", "failure_of", "masked_of", "spread", "update_of"]


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
        return TightbeamError(reply.error.reason or f"Flower's error {reply.error.code}.")
    notes = reply.content.config_records["notes"]
    if notes["status"] == "ok":
        return None
    return error_from_code(str(notes.get("code", "internal")), str(notes["reason"]), "")


def account_of(sent: Message, reply: Message) -> Row:
    """Status, bytes and figures of one exchange."""
    failure = failure_of(reply)
    notes: Mapping[str, Any] = reply.content.config_records["notes"] if reply.has_content() else {}
    row: Row = {
        "status": str(notes.get("status", "failed")),
        "reason": str(failure) if failure else "",
        "run": str(notes.get("run", "")),
        "codec": str(notes.get("codec", "")),
        "adapter_down_bytes": sum(r.count_bytes() for r in sent.content.array_records.values()),
        "message_down_bytes": message_bytes(sent),
        "message_up_bytes": message_bytes(reply),
        "adapter_up_bytes": 0,
        "ladder_down_bytes": _ladder(sent.content.array_records["arrays"]).count_bytes(),
        "fold_down_bytes": sum(r.count_bytes() for n, r in sent.content.array_records.items() if n == "fold"),
    }
    if reply.has_content() and "metrics" in reply.content.metric_records:
        metrics = reply.content.metric_records["metrics"]
        row |= {name.replace("-", "_"): value for name, value in metrics.items()}
        if arrays := reply.content.array_records:
            row["adapter_up_bytes"] = sum(record.count_bytes() for record in arrays.values())
    return row


def _ladder(record: ArrayRecord) -> ArrayRecord:
    """What of it is no adapter."""
    return ArrayRecord({name: array for name, array in record.items() if name.startswith(LADDER)})


def update_of(
    scenario: Scenario, node: Node, trained: LoraAdapter, sent: Message, reply: Message, weight: float
) -> Update:
    """What a client hands in, checked against what it was to train.

    Raises:
        UpdateRefusedError: NaN, another shape or another rank; names client and tensor.

    """
    name, given = node.profile.name, from_record(reply.content.array_records["arrays"])
    if scenario.strategy.name == "ffa":  # A is frozen, so only B comes back
        start = from_record(sent.content.array_records["arrays"])
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


def masked_of(reply: Message) -> bytes:
    """The vector in a secure reply."""
    data = reply.content.config_records["notes"]["secure"]
    assert isinstance(data, bytes)
    return data


def spread(losses: Mapping[str, tuple[float, int]]) -> dict[str, float | None] | None:
    """Mean by learned tokens, and how the clients differ; None when nobody evaluated."""
    if not losses:
        return None
    mean = sum(loss * count for loss, count in losses.values()) / sum(n for _, n in losses.values())
    by_loss = sorted(loss for loss, _ in losses.values())
    middle = by_loss[len(by_loss) // 2]
    return {"clients": len(losses), "loss": mean, "worst": by_loss[-1], "median": middle, "best": by_loss[0]}
