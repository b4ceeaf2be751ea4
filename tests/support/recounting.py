"""The federation report worked out a second time, by hand and from other sources.

Bytes, tokens and operations of steps are taken from the edges' own ledgers, adapters from Flower's count of
the messages that passed, weights from the cloud's card, seconds and joules from the scenario's own
figures, losses of rounds and evaluations from the clients' rows. Nothing of `accounts` or `alternatives` is
used. What only the server's ledger knows (edge operations, clients' losses, memory) is summed up from there.
"""

import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message

from tightbeam.common.costs.meter import read_ledger
from tightbeam.common.wire.codecs import codec
from tightbeam.edge.connection import connect
from tightbeam.simulations.apps.client_app import app
from tightbeam.simulations.scenario import Scenario

__all__ = ["FlowerCount", "Recount", "leaves"]

PER_GIGABYTE, PER_PETAFLOP, PER_KILOWATT_HOUR = 0.09, 0.005, 0.30
Row = dict[str, Any]


@dataclass
class FlowerCount:
    """The real client app, with every array in its messages counted by Flower's `count_bytes`."""

    moved: Counter[tuple[str, int, str, str]] = field(
        default_factory=Counter
    )  # kind, round, client, direction

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as a client does."""
        kind = {"train": "client_round", "evaluate": "client_eval"}.get(message.metadata.message_type)
        if kind is None:
            return app(message, context)
        number = int(str(message.content.config_records["config"]["server-round"]))
        client = f"client-{int(context.node_config['partition-id']):02d}"
        self.moved[kind, number, client, "down"] += _array_bytes(message)
        reply = app(message, context)
        self.moved[kind, number, client, "up"] += _array_bytes(reply)
        return reply


def _array_bytes(message: Message) -> int:
    records = message.content.values() if message.has_content() else ()
    return sum(record.count_bytes() for record in records if isinstance(record, ArrayRecord))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts and lists with its path."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
        if not tree:
            yield path, None
    else:
        yield path, tree


class Recount:
    """One experiment's folder, counted again."""

    def __init__(self, scenario: Scenario, folder: Path, address: str, flower: FlowerCount) -> None:
        self.folder, self.flower, self.scenario = folder, flower, scenario.model_dump(mode="json")
        self.rows = read_ledger(folder / "ledger.jsonl")
        first = next(row for row in self.rows if row["row"] == "experiment")
        self.backbone = first["backbone"]
        self.weight_bytes = _edge_bytes(address, self._cut(), self.backbone["num_blocks"])
        self.seen: set[str] = set()
        self.work = [
            self._recounted(row) for row in self.rows if row["row"] in ("client_round", "client_eval")
        ]

    def _recounted(self, row: Row) -> Row:
        """A client's row from sources other than itself."""
        name, kind, number = row["client"], row["row"], row["round"]
        ledger = read_ledger(self.folder / "clients" / name / "ledger.jsonl")
        steps = [s for s in ledger if s["row"] == "step" and row.get("run") and s["run"] == row["run"]]
        found: Row = {key: row[key] for key in ("row", "client", "round", "status", "reason")}
        found["codec"] = row.get("codec", "")
        for key in (
            "wire_up_bytes",
            "wire_down_bytes",
            "payload_up_bytes",
            "payload_down_bytes",
            "cloud_flops",
        ):
            found[key] = sum(step[key] for step in steps)
        found["tokens"] = sum(step["tokens"] for step in steps if step["kind"] == "forward")
        for direction in ("up", "down"):
            found[f"adapter_{direction}_bytes"] = self.flower.moved[kind, number, name, direction]
        first = bool(steps) and name not in self.seen
        found["weight_bytes"] = self.weight_bytes * first
        for key in ("edge_flops", "wall_s", "memory_bytes", "loss", "weight", "examples", "steps"):
            found[key] = row.get(key, 0)
        if steps:
            self.seen.add(name)
        device, network = self.scenario["client"]["device"], self.scenario["client"]["network"]
        compute_s = found["edge_flops"] / (device["gflops"] * 1e9)
        found["joules"] = compute_s * device["watts"]
        moving_s = _seconds(network, found["wire_up_bytes"], found["wire_down_bytes"], len(steps))
        moving_s += found["cloud_flops"] / (self.scenario["cloud"]["gflops"] * 1e9)
        moving_s += _seconds(network, found["adapter_up_bytes"], found["adapter_down_bytes"], 1)
        weights_s = _seconds(network, 0, found["weight_bytes"], 1) if first else 0.0
        slow = self._slowdown(name, number) if kind == "client_round" else 1.0
        found["virtual_s"] = slow * (compute_s + moving_s) + weights_s if steps else 0.0
        return found

    def _slowdown(self, name: str, number: int) -> float:
        faults = self.scenario["faults"]
        drawn = random.Random(f"{self.scenario['seed']}/straggler/{number}/{name}").random()
        return float(faults["slowdown"]) if drawn < faults["straggler"] else 1.0

    def costs(self, rows: list[Row]) -> Row:
        """The report's `Costs` of some rows."""
        sums: Row = {
            "activation_up_bytes": _sum(rows, "wire_up_bytes"),
            "activation_down_bytes": _sum(rows, "wire_down_bytes"),
        }
        for name in ("adapter_up_bytes", "adapter_down_bytes", "weight_bytes"):
            sums[name] = _sum(rows, name)
        moved = sum(sums.values())
        for name in ("tokens", "edge_flops", "cloud_flops", "joules", "wall_s"):
            sums[name] = _sum(rows, name)
        return sums | {"money": _money(moved, sums["cloud_flops"], sums["joules"])}

    def report(self) -> Row:
        """All of `federation.json`."""
        evaluations = list(self._evaluations())
        target = self.scenario["target_loss"]
        ends = [row for row in self.rows if row["row"] in ("round", "evaluation")]
        return {
            "name": self.scenario["output"]["name"],
            "model": self.backbone["model"],
            "fingerprint": self.backbone["fingerprint"],
            "strategy": self.scenario["strategy"]["name"],
            "secure": False,
            "privacy": None,
            "clients": [self._client(number) for number in range(self.scenario["clients"])],
            "rounds": [self._round(row) for row in self.rows if row["row"] == "round"],
            "evaluations": evaluations,
            "absences": self._absences(),
            "lines": [],
            "total": self.costs(self.work),
            "virtual_s": sum(self._slowest(row) for row in ends),
            "target_loss": target,
            "reached_target": next((e for e in evaluations if target and e["loss"] <= target), None),
            "alternatives": self._alternatives(),
            "prices": {
                "currency": "USD",
                "per_gigabyte": PER_GIGABYTE,
                "per_petaflop": PER_PETAFLOP,
                "per_kilowatt_hour": PER_KILOWATT_HOUR,
                "edge_watts": 45.0,
                "cloud_watts": 700.0,
            },
        }

    def _of(self, kind: str, **wanted: Any) -> list[Row]:
        return [r for r in self.work if r["row"] == kind and all(r[k] == v for k, v in wanted.items())]

    def _client(self, number: int) -> Row:
        name, options = f"client-{number:02d}", self.scenario["client"]
        trained, evaluated = self._of("client_round", client=name), self._of("client_eval", client=name)
        losses = [row["loss"] for row in evaluated if row["status"] == "ok"]
        own = [row for row in self.work if row["client"] == name]
        return {
            "name": name,
            "group": "",
            **{key: options[key] for key in ("mode", "share", "cut", "r")},
            "rounds": len([row for row in trained if row["status"] == "ok"]),
            "slow_rounds": sum(name in self._slow(row["round"])[1] for row in trained),
            "statuses": dict(Counter(row["status"] for row in trained)),
            "reasons": list(dict.fromkeys(row["reason"] for row in own if row["reason"])),
            "codecs": list(dict.fromkeys(row["codec"] for row in trained if row["codec"])),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "virtual_s": _sum(trained, "virtual_s"),
            "memory_bytes": max((row["memory_bytes"] for row in own), default=0),
            "training": self.costs(trained),
            "evaluation": self.costs(evaluated),
        }

    def _round(self, row: Row) -> Row:
        trained = self._of("client_round", round=row["round"])
        good = [one for one in trained if one["status"] == "ok"]
        weights = sum(one["weight"] for one in good)
        return {
            "round": row["round"],
            "updates": len(good),
            "statuses": dict(Counter(one["status"] for one in trained)),
            "loss": sum(one["loss"] * one["weight"] for one in good) / weights if good else None,
            "relative_error": row["relative_error"],
            "epsilon": None,
            "virtual_s": self._slowest(row),
            **dict(zip(("median_s", "slow"), self._slow(row["round"]), strict=True)),
            "notes": row["notes"],
            "training": self.costs(trained),
            "evaluation": self.costs(self._of("client_eval", round=row["round"])),
        }

    def _slow(self, number: int) -> tuple[float | None, dict[str, float]]:
        """Median of the clients' virtual seconds, and who took over 1.5 times as long."""
        took = {r["client"]: r["virtual_s"] for r in self._of("client_round", round=number) if r["virtual_s"]}
        usual = statistics.median(took.values()) if took else None
        return usual, {name: t / usual for name, t in took.items() if usual and t / usual > 1.5}

    def _absences(self) -> list[Row]:
        lost = [row for row in self.work if row["status"] != "ok"]
        found = [
            {
                "status": status,
                "reason": reason,
                "clients": sorted(
                    {r["client"] for r in lost if (r["status"], r["reason"]) == (status, reason)}
                ),
                "times": times,
            }
            for (status, reason), times in Counter((row["status"], row["reason"]) for row in lost).items()
        ]
        return sorted(found, key=lambda one: (-one["times"], one["status"], one["reason"]))

    def _slowest(self, row: Row) -> float:
        """Virtual seconds of a round or an evaluation: those of its slowest client, or the deadline."""
        kind = {"round": "client_round", "evaluation": "client_eval"}[row["row"]]
        took = max((one["virtual_s"] for one in self._of(kind, round=row["round"])), default=0.0)
        limit = self.scenario["faults"]["deadline_s"] if row["row"] == "round" else None
        return float(took if limit is None else min(took, limit))

    def _evaluations(self) -> Iterator[Row]:
        for place, row in enumerate(self.rows):
            if row["row"] != "evaluation":
                continue
            evaluated = self._of("client_eval", round=row["round"])
            ranked = sorted(evaluated, key=lambda one: one["loss"])
            losses, weights = [one["loss"] for one in ranked], _sum(evaluated, "weight")
            until = [r for r in self.rows[: place + 1] if r["row"] in ("round", "evaluation")]
            before = sum(r["row"] in ("client_round", "client_eval") for r in self.rows[:place])
            yield {
                "round": row["round"],
                "clients": len(evaluated),
                "loss": sum(one["loss"] * one["weight"] for one in evaluated) / weights,
                "worst": losses[-1],
                "median": losses[len(losses) // 2],
                "best": losses[0],
                "worst_client": ranked[-1]["client"],
                "best_client": ranked[0]["client"],
                "virtual_s": sum(self._slowest(r) for r in until),
                "moved_bytes": _moved(self.work[:before]),
            }

    def _alternatives(self) -> list[Row]:
        total, width, blocks = (
            self.costs(self.work),
            self.backbone["hidden_size"],
            self.backbone["num_blocks"],
        )
        trained, evaluated = self._of("client_round"), self._of("client_eval")
        learned, tested = _sum(trained, "tokens"), _sum(evaluated, "tokens")
        shares: Counter[str] = Counter()
        for row in trained:
            if row["examples"]:
                shares[row["client"]] += row["steps"] * self.scenario["train"]["batch_size"] / row["examples"]
        passes = max(sum(shares.values()) / len(shares), 1.0)
        flops = self.backbone["weight_bytes"] // 4 * (4 * learned + 2 * tested)
        a_block = _sum(trained, "adapter_down_bytes") / len(trained) / sum(map(int, self._cut()))
        messages = 2 * len(trained) + len(evaluated)
        wire = total["activation_up_bytes"] + total["activation_down_bytes"]
        framed = wire / (_sum(self.work, "payload_up_bytes") + _sum(self.work, "payload_down_bytes"))
        adapters, weights = total["adapter_up_bytes"] + total["adapter_down_bytes"], total["weight_bytes"]
        edge, cloud = total["edge_flops"], total["cloud_flops"]
        everywhere = self.backbone["weight_bytes"] * len({row["client"] for row in self.work})

        def crossed(name: str, rows_a_token: int, epochs: float = 1.0) -> float:
            row_bytes = codec(name).num_bytes((1000, width)) / 1000
            return float((rows_a_token * learned / epochs + 2 * tested) * row_bytes * framed)

        found = [
            ("as it was", wire, adapters, weights, edge, cloud),
            ("central LoRA", 4 * (learned / passes + tested), 0, 0, 0, flops),
            ("whole model at the edge", 0, a_block * blocks * messages, everywhere, flops, 0),
            *(
                (f"ushape, {c}", crossed(c, 4), adapters, weights, edge, cloud)
                for c in ("fp32", "bf16", "int8")
            ),
            ("top, bf16, cached", crossed("bf16", 2, passes), adapters, weights, edge, cloud / 2 / passes),
        ]
        keys = ("name", "activation_bytes", "adapter_bytes", "weight_bytes", "edge_flops", "cloud_flops")
        rows = [dict(zip(keys, values, strict=True)) for values in found]
        for row in rows:
            row["measured"] = row["name"] == "as it was"
            row["joules"] = total["joules"] / edge * row["edge_flops"]
            moved = sum(row[key] for key in keys[1:4])
            row["money"] = _money(moved, row["cloud_flops"], row["joules"])
        return rows

    def _cut(self) -> list[str]:
        return str(self.scenario["client"]["cut"]).split(":")


def _edge_bytes(address: str, cut: list[str], num_blocks: int) -> int:
    """Bytes of what the cloud serves to a client of this cut: all weights but the trunk's."""
    bottom, top = map(int, cut)
    trunk = {f"block.{index}" for index in range(bottom, num_blocks - top)}
    with connect(address, insecure=True) as cloud:
        served = {blob.name: blob.num_bytes for blob in cloud.card.blobs}
    assert trunk <= served.keys()
    return sum(size for name, size in served.items() if name not in trunk and not name.startswith("file/"))


def _seconds(network: Mapping[str, float], up_bytes: int, down_bytes: int, round_trips: int) -> float:
    rtt_s, loss = network["rtt_ms"] / 1e3, network["loss"]
    tcp = 1460 / rtt_s * math.sqrt(1.5 / loss) if rtt_s and loss else math.inf

    def rate(mbps: float) -> float:
        return min(mbps * 125_000, tcp)

    return round_trips * rtt_s + up_bytes / rate(network["up_mbps"]) + down_bytes / rate(network["down_mbps"])


def _sum(rows: list[Row], name: str) -> Any:
    return sum(row[name] for row in rows)


def _moved(rows: list[Row]) -> int:
    names = ("wire_up_bytes", "wire_down_bytes", "adapter_up_bytes", "adapter_down_bytes", "weight_bytes")
    return sum(row[name] for row in rows for name in names)


def _money(moved_bytes: float, cloud_flops: float, joules: float) -> float:
    traffic = moved_bytes / 1e9 * PER_GIGABYTE
    return traffic + cloud_flops / 1e15 * PER_PETAFLOP + joules / 3.6e6 * PER_KILOWATT_HOUR
