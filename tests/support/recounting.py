"""The federation report worked out a second time, by hand and from other sources (see `recounting_rows`).

Nothing of `accounts`, `job` or `alternatives` is used. How far a round is off the exact mean is computed anew
from what the clients handed in, as far back as the server keeps its states; epsilon by Google's accountant.
"""

import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting import dp_event, rdp
from safetensors.numpy import load_file

from support.flower_count import FlowerCount
from support.recounting_otherwise import (
    PER_GIGABYTE,
    PER_KILOWATT_HOUR,
    PER_PETAFLOP,
    alternatives,
    money,
)
from support.recounting_rows import Clients, Row
from tightbeam.common.accounts.prices import Prices
from tightbeam.federation.scenario import FLOWER_STRATEGIES, Scenario

__all__ = ["Recount", "differences", "leaves"]

_ENDS = {"round": "client_round", "evaluation": "client_eval"}


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts and lists with its path."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
        if not tree:
            yield path, None
    else:
        yield path, tree


def differences(report: Row, recount: Row) -> list[str]:
    """Paths that one of the two lacks, or at which they say different things."""
    left, right = dict(leaves(report)), dict(leaves(recount))
    wrong = [path for path in left.keys() ^ right.keys() if not path.endswith("/rule")]
    for path in left.keys() & right.keys():
        one, other = left[path], right[path]
        if isinstance(one, int | float) and isinstance(other, int | float):
            # what is computed for the alternatives is rounded to whole bytes and operations, then priced
            spare = (0.51 if isinstance(one, int) else 1e-10) if "/alternatives/" in path else 1e-12
            same = abs(one - other) <= max(spare, 1e-9 * abs(other))
        else:
            same = one == other
        if not same:
            wrong.append(f"{path}: {one} is not {other}")
    return sorted(wrong)


class Recount:
    """One experiment's folder, counted again."""

    def __init__(self, scenario: Scenario, folder: Path, sizes: dict[str, int], flower: FlowerCount) -> None:
        self.clients = Clients(scenario, folder, sizes, flower)
        self.folder, self.flower = folder, flower
        self.scenario, self.rows, self.work = self.clients.scenario, self.clients.rows, self.clients.work
        self._of, self._releases = self.clients.of, 0

    def report(self) -> Row:
        """All of `federation.json`."""
        evaluations, backbone = list(self._evaluations()), self.clients.backbone
        target, strategy = self.scenario["target_loss"], self.scenario["strategy"]
        ends = [row for row in self.rows if row["row"] in _ENDS]
        rounds = [self._round(row) for row in self.rows if row["row"] == "round"]
        return {
            "name": self.scenario["output"]["name"],
            "model": backbone["model"],
            "fingerprint": backbone["fingerprint"],
            "strategy": strategy["name"],
            "secure": strategy["secure"],
            "privacy": self._privacy(),
            "clients": [self._client(name) for name in self.clients.options],
            "rounds": rounds,
            "evaluations": evaluations,
            "headline": self._headline(),
            "exported": self._exported(),
            "absences": self._absences(),
            "changes": [],  # nothing is resumed here
            "lines": self._lines() if self.rows[0]["shaped"] else [],
            "total": costs(self.work),
            "virtual_s": sum(self._slowest(row) for row in ends),
            "target_loss": target,
            "reached_target": next((e for e in evaluations if target and e["loss"] <= target), None),
            "alternatives": alternatives(self.clients),
            "prices": {
                "currency": "USD",
                "per_gigabyte": PER_GIGABYTE,
                "per_petaflop": PER_PETAFLOP,
                "per_kilowatt_hour": PER_KILOWATT_HOUR,
                "edge_watts": None,
                "cloud_watts": None,
            },
            "price_sources": dict.fromkeys(Prices.model_fields, "assumed"),
        }

    def _exported(self) -> Row | None:
        """Of the written adapter only the server's ledger knows."""
        told = next((row for row in self.rows if row["row"] == "exported" and row["asked"]), None)
        if told is None:
            return None
        rows = [row for row in self.rows if row["row"] == "client_exported"]
        good = [row for row in rows if row["status"] == "ok"]
        names = {"wire_up_bytes", "wire_down_bytes", "adapter_up_bytes", "adapter_down_bytes", "weight_bytes"}
        names |= {"tokens", "edge_flops", "cloud_flops", "joules", "wall_s"}
        figures = {key: value for key, value in _spread(good).items() if not key.endswith("_client")}
        absent = {row["client"]: row["reason"] for row in rows if row not in good}
        found = costs([dict.fromkeys(names, 0) | row for row in rows])
        return figures | {"clients": len(good), "absent": absent, "costs": found}

    def _headline(self) -> Row | None:
        """The same clients, before and after."""
        ends = [row for row in self.rows if row["row"] == "evaluation"]
        if len(ends) < 2:
            return None
        told = [row for row in self.rows if row["row"] == "exported"]
        if self.clients.secure:
            means = {"before": ends[0]["loss"], "after": ends[-1]["loss"], "worst": None, "best": None}
            return means | {"clients": ends[-1]["clients"], "same_clients": False, "exported": bool(told)}
        first, last = (self._of("client_eval", round=end["round"]) for end in (ends[0], ends[-1]))
        if told and told[0]["asked"]:
            last = [row for row in self.rows if row["row"] == "client_exported"]
        of = [{row["client"]: row for row in rows if row["status"] == "ok"} for rows in (first, last)]
        both = of[0].keys() & of[1].keys()
        before, after = (_spread([rows[name] for name in both]) for rows in of)
        ends_of = {key: [before[key], after[key]] for key in ("worst", "best")}
        figures = {"before": before["loss"], "after": after["loss"], **ends_of}
        return figures | {"clients": len(both), "same_clients": True, "exported": bool(told)}

    def _client(self, name: str) -> Row:
        options = self.clients.options[name]
        trained, evaluated = self._of("client_round", client=name), self._of("client_eval", client=name)
        losses = [row["loss"] for row in evaluated if row["loss"] is not None]
        own = [row for row in self.work if row["client"] == name]
        return {
            "name": name,
            **{key: options[key] for key in ("group", "mode", "share", "cut", "r")},
            "rounds": len([row for row in trained if row["status"] == "ok"]),
            "slow_rounds": sum(name in self._slow(row["round"])[1] for row in trained),
            "statuses": dict(Counter(row["status"] for row in trained)),
            "reasons": list(dict.fromkeys(row["reason"] for row in own if row["reason"])),
            "codecs": list(dict.fromkeys(row["codec"] for row in trained if row["codec"])),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "virtual_s": sum(row["virtual_s"] for row in trained),
            "memory_bytes": max((row["memory_bytes"] for row in own), default=0),
            "training": costs(trained),
            "evaluation": costs(evaluated),
        }

    def _round(self, row: Row) -> Row:
        trained = self._of("client_round", round=row["round"])
        good = [one for one in trained if one["status"] == "ok"]
        weights = sum(one["weight"] for one in good)
        loss = sum(one["loss"] * one["weight"] for one in good) / weights if weights else None
        return {
            "round": row["round"],
            "updates": len(good),
            "statuses": dict(Counter(one["status"] for one in trained)),
            "loss": row["loss"] if self.clients.secure else loss,  # of all together: there is no other source
            "relative_error": self._error(row, good),
            "epsilon": self._epsilon(released=bool(good)),
            "secure_bytes": self.flower.keys["client_round", row["round"]],
            "virtual_s": self._slowest(row),
            **dict(zip(("median_s", "slow"), self._slow(row["round"]), strict=True)),
            "notes": row["notes"],
            "training": costs(trained),
            "evaluation": costs(self._of("client_eval", round=row["round"])),
        }

    def _privacy(self) -> Row | None:
        section = self.scenario["strategy"]["privacy"]
        if section is None:
            return None
        told = {key: section[key] for key in section if key != "quantile"}
        spent = self._reference(len([row for row in self.rows if row["row"] == "round" and row["updates"]]))
        return told | {"epsilon": spent, "secure": self.clients.secure}

    def _epsilon(self, *, released: bool) -> float | None:
        if self.scenario["strategy"]["privacy"] is None:
            return None
        self._releases += released
        return self._reference(self._releases)

    def _reference(self, releases: int) -> float:
        section, accountant = self.scenario["strategy"]["privacy"], rdp.RdpAccountant()
        assert section["clipping"] == "fixed"
        if not releases:
            return 0.0
        accountant.compose(dp_event.GaussianDpEvent(section["noise_multiplier"]), releases)
        return float(accountant.get_epsilon(section["delta"]))

    def _error(self, row: Row, good: list[Row]) -> float | None:
        """||held - mean|| / ||mean||, with every matrix written out."""
        strategy, number = self.scenario["strategy"], row["round"]
        if strategy["name"] in FLOWER_STRATEGIES or strategy["secure"] or strategy["privacy"] or not good:
            return None
        state = self.folder / "state" / f"round-{number}.safetensors"
        if not state.exists():  # there is no trace
            return float(row["relative_error"])
        means, after = self._means(number, good), load_file(state)
        if not means:
            return None
        held = {layer: _product(after, f"global/learned/{layer}") for layer in means}
        off = sum(float(np.sum((held[layer] - mean) ** 2)) for layer, mean in means.items())
        error = float(np.sqrt(off / sum(float(np.sum(mean**2)) for mean in means.values())))
        # what is folded crosses in float32, and the report's figure is of float64
        rounding = strategy["name"] in ("flora", "ffa") and abs(error - row["relative_error"]) < 1e-6
        return float(row["relative_error"]) if rounding else error

    def _means(self, number: int, good: list[Row]) -> dict[str, Any]:
        """The weighted mean of what the clients hold, layer by layer among those who have it."""
        sums: dict[str, Any] = {}
        weights: Counter[str] = Counter()
        for one in good:
            worn = self.flower.worn[number, one["client"]]
            names = {name for name in worn if ".lora_" in name and not name.startswith("fold/")}
            for layer in {name.partition(".lora_")[0] for name in names}:
                learned = self.scenario["adapter"]["scale"] * _product(worn, layer)
                if f"fold/{layer}.lora_A.weight" in worn:
                    learned += _product(worn, f"fold/{layer}")
                sums[layer] = sums.get(layer, 0.0) + one["weight"] * learned
                weights[layer] += one["weight"]
        return {layer: total / weights[layer] for layer, total in sums.items()}

    def _slow(self, number: int) -> tuple[float | None, dict[str, float]]:
        """Median of the clients' virtual seconds, and who took over 1.5 times as long."""
        took = {r["client"]: r["virtual_s"] for r in self._of("client_round", round=number) if r["virtual_s"]}
        usual = statistics.median(took.values()) if took else None
        return usual, {name: t / usual for name, t in took.items() if usual and t / usual > 1.5}

    def _absences(self) -> list[Row]:
        lost = [row for row in self.work if row["status"] != "ok"]
        times = Counter((row["status"], row["reason"]) for row in lost)
        who = {one: {row["client"] for row in lost if (row["status"], row["reason"]) == one} for one in times}
        ranked = sorted(times, key=lambda one: (-times[one], one))
        return [
            {"status": one[0], "reason": one[1], "clients": sorted(who[one]), "times": times[one]}
            for one in ranked
        ]

    def _lines(self) -> list[Row]:
        groups: dict[str, list[str]] = {}
        for name, options in self.clients.options.items():
            groups.setdefault(options["group"], []).append(name)
        return [
            {"group": group, "clients": len(names)}
            | {
                key: sum(row[of] for row in self.work if row["client"] in names)
                for key, of in (("measured_s", "network_s"), ("virtual_s", "network_virtual_s"))
            }
            for group, names in groups.items()
        ]

    def _slowest(self, row: Row) -> float:
        """Virtual seconds of a round or an evaluation: those of its slowest client, or the deadline."""
        took = max((one["virtual_s"] for one in self._of(_ENDS[row["row"]], round=row["round"])), default=0.0)
        limit = self.scenario["faults"]["deadline_s"] if row["row"] == "round" else None
        return float(took if limit is None else min(took, limit))

    def _evaluations(self) -> Iterator[Row]:
        for place, row in enumerate(self.rows):
            if row["row"] != "evaluation":
                continue
            evaluated = [r for r in self._of("client_eval", round=row["round"]) if r["status"] == "ok"]
            until = [r for r in self.rows[: place + 1] if r["row"] in _ENDS]
            before = sum(r["row"] in _ENDS.values() for r in self.rows[:place])
            yield {
                "round": row["round"],
                "clients": len(evaluated),
                **(_nobodys(row["loss"]) if self.clients.secure else _spread(evaluated)),
                "virtual_s": sum(self._slowest(r) for r in until),
                "moved_bytes": _moved(self.work[:before]),
                "secure_bytes": self.flower.keys["client_eval", row["round"]],
            }


def _spread(evaluated: list[Row]) -> Row:
    ranked = sorted(evaluated, key=lambda one: one["loss"])
    weights = sum(one["weight"] for one in ranked)
    return {
        "loss": sum(one["loss"] * one["weight"] for one in ranked) / weights,
        "worst": ranked[-1]["loss"],
        "median": ranked[len(ranked) // 2]["loss"],
        "best": ranked[0]["loss"],
        "worst_client": ranked[-1]["client"],
        "best_client": ranked[0]["client"],
    }


def _nobodys(loss: float) -> Row:
    return {"loss": loss} | dict.fromkeys(("worst", "median", "best", "worst_client", "best_client"))


def costs(rows: list[Row]) -> Row:
    """The report's `Costs` of some rows."""
    names = ("adapter_up_bytes", "adapter_down_bytes", "weight_bytes", "tokens", "edge_flops", "cloud_flops")
    sums: Row = {name: sum(row[name] for row in rows) for name in (*names, "joules", "wall_s")}
    for way in ("up", "down"):
        sums[f"activation_{way}_bytes"] = sum(row[f"wire_{way}_bytes"] for row in rows)
    return sums | {"money": money(_moved(rows), sums["cloud_flops"], sums["joules"])}


def _moved(rows: list[Row]) -> int:
    names = ("wire_up_bytes", "wire_down_bytes", "adapter_up_bytes", "adapter_down_bytes", "weight_bytes")
    return sum(row[name] for row in rows for name in names)


def _product(factors: dict[str, Any], layer: str) -> Any:
    A, B = (factors[f"{layer}.lora_{which}.weight"].astype(np.float64) for which in "AB")
    return B @ A
