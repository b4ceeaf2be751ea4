"""Held-out losses before and after an experiment: of the same clients, and of the adapter that it leaves."""

from collections.abc import Mapping, Sequence
from typing import Any

from tightbeam.common.accounts.prices import Prices
from tightbeam.federation.accounts.schema import Costs, Exported, Headline
from tightbeam.federation.server.pricing import with_offers

__all__ = ["exported_of", "headline_of"]

_Row = Mapping[str, Any]


def headline_of(rows: Sequence[_Row]) -> Headline | None:
    """Over the clients of both the first and the last evaluation; None where nobody was evaluated twice."""
    rounds = [row["round"] for row in rows if row["row"] == "evaluation"]
    if len(rounds) < 2:
        return None
    told = _told(rows)
    before = _losses(rows, "client_eval", rounds[0])
    after = _losses(rows, "client_eval", rounds[-1])
    if told is not None and told["asked"]:
        after = _losses(rows, "client_exported", told["round"])
    both = sorted(before.keys() & after.keys())
    if both:
        pairs = [(before[name][0], after[name][0]) for name in both]
        weights = [after[name][1] for name in both]
        first, last = (
            sum(pair[at] * n for pair, n in zip(pairs, weights, strict=True)) / sum(weights) for at in (0, 1)
        )
        worst, best = ((f(p[0] for p in pairs), f(p[1] for p in pairs)) for f in (max, min))
        return Headline(
            clients=len(both), before=first, after=last, worst=worst, best=best, same_clients=True,
            exported=told is not None,
        )  # fmt: skip
    if before or after:
        return None
    ends = [row for row in rows if row["row"] == "evaluation"]
    return Headline(
        clients=ends[-1]["clients"], before=ends[0]["loss"], after=ends[-1]["loss"], worst=None, best=None,
        same_clients=False, exported=told is not None,
    )  # fmt: skip


def exported_of(rows: Sequence[_Row], prices: Prices | None) -> Exported | None:
    """What the clients said of the written adapter, if they were asked."""
    told = _told(rows)
    if told is None or not told["asked"]:
        return None
    asked = [row for row in rows if row["row"] == "client_exported" and row["round"] == told["round"]]
    own = with_offers([dict(row) for row in asked])
    return Exported(
        **{name: told[name] for name in ("clients", "loss", "worst", "median", "best")},
        absent={row["client"]: row["reason"] for row in own if row["status"] != "ok"},
        costs=Costs.of(own, prices),
    )


def _told(rows: Sequence[_Row]) -> _Row | None:
    """Whether the adapter of the last round was evaluated as it was written, and with what result."""
    last = max((row["round"] for row in rows if row["row"] == "round"), default=0)
    found = [row for row in rows if row["row"] == "exported" and row["round"] == last]
    return found[-1] if found else None


def _losses(rows: Sequence[_Row], kind: str, number: int) -> dict[str, tuple[float, float]]:
    """Loss and weight of every client of one evaluation."""
    return {
        row["client"]: (row["loss"], row["weight"])
        for row in rows
        if row["row"] == kind and row["round"] == number and row["status"] == "ok" and "loss" in row
    }
