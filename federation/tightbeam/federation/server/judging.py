"""What the server believes of a client's words and figures: known ones of the right kind, within what can be.

A reply is another machine's word. One NaN or one figure too many would end everybody's run, or own the mean;
so a reply is judged whole before any of it reaches the ledger, and refused alone.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message

from tightbeam.common.errors import FederationError, UpdateRefusedError
from tightbeam.federation.contract.messages import HIDDEN
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.journal import Row

__all__ = ["STATUSES", "figures_told", "layers_told", "missed_of", "notes_of", "said"]

STATUSES = ("ok", "failed", "dropped", "left", "skipped")
"""What a client may say of itself."""

_COUNTED = (
    "tokens", "payload-up-bytes", "payload-down-bytes", "wire-up-bytes", "wire-down-bytes", "cloud-flops",
)  # fmt: skip
_WHOLE = (
    *_COUNTED, "weight", "examples", "steps", "learned-tokens", "weight-bytes", "edge-flops", "memory-bytes",
)  # fmt: skip
_REAL = ("loss", "wall-s", "edge-s", "network-s", "network-virtual-s", "virtual-s", "joules")
_BIT = "norm_bit"  # Flower's: whether an adaptive norm clipped the update
_MOST = 1e15  # of a figure that is no count: sums of a million clients stay finite
_LONGEST = 600  # characters of a reason that are kept


def said(value: object) -> str:
    """A client's text as one line that a terminal and a page can bear."""
    line = " ".join(str(value).split())
    return "".join(one if one.isprintable() else "?" for one in line)[:_LONGEST]


def notes_of(reply: Message) -> ConfigRecord:
    """The words of a reply; empty for one without."""
    return (reply.content.config_records.get("notes") if reply.has_content() else None) or ConfigRecord()


def figures_told(scenario: Scenario, client: str, reply: Message, *, trains: bool) -> Row:
    """The figures of a reply, by their names in the ledger.

    Raises:
        UpdateRefusedError: one is missing, unknown, of another kind, or beyond what can be; names it.

    """
    metrics: Mapping[str, Any] = reply.content.metric_records.get("metrics") or {}
    wanted: set[str] = set(_COUNTED)
    if notes_of(reply).get("status") == "ok":
        wanted = {*_WHOLE, *_REAL} - set(HIDDEN if scenario.strategy.secure else ())
        wanted |= {"adapter-up-bytes"} if trains else set()
        privacy = scenario.strategy.privacy
        if trains and privacy and (privacy.where, privacy.clipping) == ("client", "adaptive"):
            wanted.add(_BIT)
    elif not metrics:
        return {}
    row = _checked(client, metrics, wanted)
    if "weight" in row:
        _require_fair(scenario, client, row, trains=trains)
    return row


def missed_of(client: str, reply: Message) -> Row:
    """What a client did before a resume and could not tell; nothing if that is no sound account."""
    if "unheard" not in reply.content.metric_records:
        return {}
    metrics = reply.content.metric_records.pop("unheard")  # Flower's strategies take one record
    try:
        return {"run": "", "codec": "", **_checked(client, metrics, set(_COUNTED))}
    except UpdateRefusedError:
        return {}


def _checked(client: str, metrics: Mapping[str, Any], wanted: set[str]) -> Row:
    for name in sorted(wanted | metrics.keys()):
        if name not in metrics:
            raise _refused(client, f"{name} is missing")
        value = metrics[name]
        if name not in wanted:
            raise _refused(client, f"{said(name)} is no figure of it")
        whole = name not in (*_REAL, _BIT)
        if not isinstance(value, int if whole else (int, float)):
            raise _refused(client, f"{name} is {said(value)}, not a {'whole ' * whole}number")
        if not (math.isfinite(value) and value >= 0 and (whole or value <= (1 if name == _BIT else _MOST))):
            raise _refused(client, f"{name} is {value}")
    return {name.replace("-", "_"): value for name, value in metrics.items()}


def _require_fair(scenario: Scenario, client: str, row: Row, *, trains: bool) -> None:
    """A client counts by what the scenario says, and by no more than its steps or its examples can hold."""
    section, train = scenario.strategy, scenario.train
    unit: Mapping[str, int] = {"examples": row["examples"], "tokens": row["learned_tokens"], "equal": 1}
    counts = unit[section.weight] if trains else row["learned_tokens"]
    if row["weight"] != counts:
        raise _refused(client, f"its weight is {row['weight']}, and by strategy.weight it is {counts}")
    if row["weight"] < 1 or (trains and row["weight"] > section.max_weight):
        raise _refused(
            client,
            f"its weight is {row['weight']}, not 1 to {section.max_weight}: "
            "if that is right, raise strategy.max_weight",
        )
    seen = train.steps * train.gradient_accumulation * train.batch_size if trains else row["examples"]
    if not row["learned_tokens"] <= row["tokens"] <= seen * scenario.data.max_length:
        told = f"{row['learned_tokens']} learned of {row['tokens']} tokens"
        raise _refused(client, f"{told} do not fit {seen} examples of up to {scenario.data.max_length}")


def layers_told(client: str, reply: Message) -> dict[str, Any]:
    """What a client says it shares, of which backbone.

    Raises:
        FederationError: it is not what a client of this version says.

    """
    try:
        told = json.loads(str(notes_of(reply)["layers"]))
        shapes, below, backbone = told["shapes"], told["below"], told["backbone"]
        sizes = [size for shape in shapes.values() for size in shape]
        fits = all(isinstance(size, int) and 1 <= size < 2**31 for size in sizes)
        fits = fits and all(isinstance(name, str) for name in below)
        fits = fits and all(isinstance(backbone[name], str) for name in ("model", "fingerprint", "dtype"))
        counts = [backbone[name] for name in ("num_blocks", "hidden_size", "weight_bytes")]
        if not fits or not all(isinstance(n, int) and n > 0 for n in counts) or "side" not in told:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FederationError(
            f"{client} does not say what it shares.", cure="Run one version of tightbeam on all nodes."
        ) from error
    return dict(told)


def _refused(client: str, why: str) -> UpdateRefusedError:
    return UpdateRefusedError(
        f"The reply of {client} is refused: {why}.", cure="The other clients' updates are not affected."
    )
