"""What a federated experiment cost, summed up from the server's ledger: per client, per round, in all.

Every figure is a sum of ledger rows, or follows from sums (see `alternatives`).
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from tightbeam.common.accounts.prices import Prices
from tightbeam.common.errors import DataError
from tightbeam.edge.report.meter import read_ledger
from tightbeam.federation.accounts.alternatives import alternatives
from tightbeam.federation.accounts.headline import exported_of, headline_of
from tightbeam.federation.accounts.schema import (
    Absence,
    ClientAccount,
    Costs,
    Evaluation,
    FederationAccount,
    LineAccount,
    PrivacyAccount,
    RoundAccount,
)
from tightbeam.federation.accounts.workload import workload_of
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.federation.server.journal import Row, slow_clients
from tightbeam.federation.server.pricing import moved_bytes, tariff_of, with_offers
from tightbeam.federation.server.resuming import scenario_told

__all__ = ["account"]

_WORK = ("client_round", "client_eval")


def account(
    folder: Path, scenario: Scenario | None = None, prices: Prices | None = None
) -> FederationAccount:
    """Sum up the ledger in an experiment's folder; what `prices` leaves out is what the clouds asked for.

    Raises:
        DataError: there is no ledger, or it has not begun, or its clouds ask in several currencies.

    """
    rows = read_ledger(folder / "ledger.jsonl")
    first = next((row for row in rows if row["row"] == "experiment"), None)
    if first is None:
        raise DataError(
            f"{folder} holds no experiment that has begun.", cure="Run `tightbeam simulate` first."
        )
    told = scenario_told(rows) or {}
    scenario = scenario or scenario_from_mapping(told, origin=str(folder / "ledger.jsonl"))
    work = with_offers([row for row in rows if row["row"] in _WORK])
    tariff = tariff_of(work, prices)
    evaluations = _evaluations(rows)
    reached = [e for e in evaluations if scenario.target_loss is not None and e.loss <= scenario.target_loss]
    return FederationAccount(
        name=scenario.output.name,
        model=first["backbone"]["model"],
        fingerprint=first["backbone"]["fingerprint"],
        strategy=scenario.strategy.name,
        secure=scenario.strategy.secure,
        privacy=_privacy(scenario, rows),
        clients=_clients(scenario, work, prices),
        rounds=[_round(row, work, prices) for row in rows if row["row"] == "round"],
        evaluations=evaluations,
        headline=headline_of(rows),
        exported=exported_of(rows, prices),
        absences=_absences(work),
        changes=[
            f"after round {row['round']}: {c}"
            for row in rows
            if row["row"] == "changed"
            for c in row["changes"]
        ],
        lines=_lines(scenario, work) if first.get("shaped") else [],
        total=Costs.of(work, prices),
        virtual_s=sum(row["virtual_s"] for row in rows if row["row"] in ("round", "evaluation")),
        target_loss=scenario.target_loss,
        reached_target=reached[0] if reached else None,
        alternatives=alternatives(workload_of(scenario, first["backbone"], work), tariff.prices),
        prices=tariff.prices,
        price_sources=dict(tariff.sources),
    )


def _privacy(scenario: Scenario, rows: Sequence[Row]) -> PrivacyAccount | None:
    section = scenario.strategy.privacy
    if section is None:
        return None
    spent = [row["epsilon"] for row in rows if row["row"] == "round"]
    return PrivacyAccount(
        epsilon=spent[-1] if spent else 0.0,
        delta=section.delta,
        noise_multiplier=section.noise_multiplier,
        clipping_norm=section.clipping_norm,
        where=section.where,
        clipping=section.clipping,
        secure=scenario.strategy.secure,
    )


def _clients(scenario: Scenario, work: Sequence[Row], prices: Prices | None) -> list[ClientAccount]:
    found, slow = [], [name for slow in _took(work).values() for name in slow_clients(slow)]
    for profile in scenario.profiles():
        own = [row for row in work if row["client"] == profile.name]
        trained = [row for row in own if row["row"] == "client_round"]
        losses = [
            row["loss"]
            for row in own
            if row["row"] == "client_eval" and "loss" in row and row["status"] == "ok"
        ]
        options = profile.options
        found.append(
            ClientAccount(
                name=profile.name,
                group=profile.group,
                mode=options.mode,
                share=options.share,
                cut=options.cut,
                r=options.r,
                rounds=sum(row["status"] == "ok" for row in trained),
                slow_rounds=slow.count(profile.name),
                statuses=_statuses(trained),
                reasons=list(dict.fromkeys(row["reason"] for row in own if row["reason"])),
                codecs=list(dict.fromkeys(row["codec"] for row in trained if row["codec"])),
                first_loss=losses[0] if losses else None,
                last_loss=losses[-1] if losses else None,
                virtual_s=sum(row.get("virtual_s", 0.0) for row in trained),
                memory_bytes=max((row.get("memory_bytes", 0) for row in own), default=0),
                training=Costs.of(trained, prices),
                evaluation=Costs.of((row for row in own if row["row"] == "client_eval"), prices),
            )
        )
    return found


def _round(row: Row, work: Sequence[Row], prices: Prices | None) -> RoundAccount:
    same = [one for one in work if one["round"] == row["round"]]
    trained = [one for one in same if one["row"] == "client_round"]
    took = _took(trained).get(row["round"], {})
    return RoundAccount(
        round=row["round"],
        updates=row["updates"],
        statuses=_statuses(trained),
        loss=row["loss"],
        relative_error=row["relative_error"],
        epsilon=row.get("epsilon"),
        secure_bytes=row.get("secure_bytes", 0),
        virtual_s=row["virtual_s"],
        median_s=statistics.median(took.values()) if took else None,
        slow=slow_clients(took),
        notes=row["notes"],
        training=Costs.of(trained, prices),
        evaluation=Costs.of((one for one in same if one["row"] == "client_eval"), prices),
    )


def _took(work: Iterable[Row]) -> dict[int, dict[str, float]]:
    """Virtual seconds of every client that worked, by round."""
    found: dict[int, dict[str, float]] = {}
    for row in work:
        if row["row"] == "client_round" and row["status"] != "cut off" and row.get("virtual_s"):
            found.setdefault(row["round"], {})[row["client"]] = row["virtual_s"]
    return found


def _absences(work: Iterable[Row]) -> list[Absence]:
    clients: dict[tuple[str, str], list[str]] = {}
    for row in work:
        if row["status"] != "ok":
            clients.setdefault((row["status"], row["reason"]), []).append(row["client"])
    return [
        Absence(status=status, reason=reason, clients=sorted(set(names)), times=len(names))
        for (status, reason), names in sorted(clients.items(), key=lambda one: (-len(one[1]), one[0]))
    ]


def _lines(scenario: Scenario, work: Sequence[Row]) -> list[LineAccount]:
    groups: dict[str, set[str]] = {}
    for profile in scenario.profiles():
        groups.setdefault(profile.group, set()).add(profile.name)
    return [
        LineAccount(
            group=group,
            clients=len(names),
            measured_s=sum(row.get("network_s", 0.0) for row in work if row["client"] in names),
            virtual_s=sum(row.get("network_virtual_s", 0.0) for row in work if row["client"] in names),
        )
        for group, names in groups.items()
    ]


def _statuses(rows: Iterable[Row]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return counts


def _evaluations(rows: Sequence[Row]) -> list[Evaluation]:
    found, moved, virtual_s = [], 0, 0.0
    losses: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["row"] in _WORK:
            moved += moved_bytes(row)
            if row["row"] == "client_eval" and row["status"] == "ok" and "loss" in row:
                losses.setdefault(row["round"], {})[row["client"]] = row["loss"]
        elif row["row"] == "round":
            virtual_s += row["virtual_s"]
        elif row["row"] == "evaluation":
            virtual_s += row["virtual_s"]
            figures = {name: row[name] for name in ("round", "clients", "loss", "worst", "median", "best")}
            of = losses.get(row["round"], {})
            worst, best = (max(of, key=of.__getitem__), min(of, key=of.__getitem__)) if of else (None, None)
            found.append(
                Evaluation(
                    **figures,
                    worst_client=worst,
                    best_client=best,
                    virtual_s=virtual_s,
                    moved_bytes=moved,
                    secure_bytes=row.get("secure_bytes", 0),
                )
            )
    return found
