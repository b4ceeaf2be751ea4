"""The rows of an experiment's clients counted again, from everything but themselves.

Bytes and operations of steps are taken from the edges' own ledgers, adapters from Flower's count of the
messages that passed, weights from the cloud's card, tokens and examples from the clients' files, seconds and
joules from the scenario's own figures, dropouts and delays from its seed. What only the server's ledger knows
(edge operations, losses, memory, this machine's seconds, a reason's words) is taken from there.
"""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.edge_runs import byte_tokenizer
from support.flower_count import FlowerCount
from tightbeam.edge.data import Example, load_examples
from tightbeam.edge.link.connection import connect
from tightbeam.edge.recipe import TrainSection
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.plan import Plan
from tightbeam.federation.scenario import Scenario

__all__ = ["Clients", "Row"]

Row = dict[str, Any]
_STEPS = ("wire_up_bytes", "wire_down_bytes", "payload_up_bytes", "payload_down_bytes", "cloud_flops")
_TOLD = ("edge_flops", "wall_s", "memory_bytes")


class Clients:
    """All clients of one experiment's folder, and their rows."""

    def __init__(
        self, scenario: Scenario, folder: Path, sizes: Mapping[str, int], flower: FlowerCount
    ) -> None:
        """`sizes` are those of the cloud's weights by name."""
        self.folder, self.flower, self.sizes = folder, flower, sizes
        self.scenario = scenario.model_dump(mode="json")
        self.options = self._options()
        self.secure = self.scenario["strategy"]["secure"]
        self.rows = read_ledger(folder / "ledger.jsonl")
        self.backbone = next(row for row in self.rows if row["row"] == "experiment")["backbone"]
        self._seen: set[str] = set()
        self._files: dict[Path, list[Example]] = {}
        self.work = [self._again(row) for row in self.rows if row["row"] in ("client_round", "client_eval")]

    @staticmethod
    def sizes_at(address: str, identity: Path | None = None) -> dict[str, int]:
        """Bytes of all weights that the cloud serves, by name."""
        with connect(address, identity=identity, insecure=identity is None) as cloud:
            return {
                blob.name: blob.num_bytes for blob in cloud.card.blobs if not blob.name.startswith("file/")
            }

    def _options(self) -> dict[str, Row]:
        owners = [
            (name, group) for name, group in self.scenario["groups"].items() for _ in range(group["clients"])
        ]
        owners += [("", {})] * (self.scenario["clients"] - len(owners))
        common = self.scenario["client"]
        return {
            f"client-{number:02d}": {
                key: common[key] if group.get(key) is None else group[key] for key in common
            }
            | {"group": name}
            for number, (name, group) in enumerate(owners)
        }

    def _again(self, row: Row) -> Row:
        name, kind, number = row["client"], row["row"], row["round"]
        ledger = self.folder / "clients" / name / "ledger.jsonl"
        steps = read_ledger(ledger) if ledger.exists() and row["run"] else []
        steps = [step for step in steps if step["row"] == "step" and step["run"] == row["run"]]
        found: Row = {key: row[key] for key in ("row", "client", "round", "status", "reason", "codec")}
        found |= {key: sum(step[key] for step in steps) for key in _STEPS}
        found |= {key: row.get(key, 0) for key in _TOLD}
        found["loss"] = row.get("loss")
        for way in ("up", "down"):
            found[f"adapter_{way}_bytes"] = self.flower.moved[kind, number, name, way]
        found["tokens"] = sum(step["tokens"] for step in steps if step["kind"] == "forward")
        worked = row["status"] in ("ok", "late", "refused")
        first = worked and name not in self._seen
        found["weight_bytes"] = first * self.held(name)
        found["examples"] = found["steps"] = found["weight"] = 0
        found |= {"joules": 0.0, "virtual_s": 0.0, "network_s": 0.0, "network_virtual_s": 0.0}
        if worked:
            self._seen.add(name)
            found |= self._worked(found) | self._time(found, steps, first)
        if kind == "client_round":
            found["status"] = self._status(found)
        return found

    def _worked(self, found: Row) -> Row:
        """What it worked on: tokens count whether they crossed or not, and weights by the scenario."""
        name, number = found["client"], found["round"]
        evaluates = found["row"] == "client_eval"
        examples = self._examples(name, "eval" if evaluates else "train")
        seen, section = [examples], self.scenario["train"]
        if not evaluates:
            seed = random.Random(f"{self.scenario['seed']}/order/0/{name}").randrange(2**31)
            section = TrainSection(steps=number * section["steps"], batch_size=section["batch_size"])
            plan = Plan(len(examples), section, seed)
            steps = range((number - 1) * self.scenario["train"]["steps"], section.steps or 0)
            seen = [[examples[i] for i in batch] for step in steps for batch in plan.micro_batches(step)]
        tokens = sum(len(example.input_ids) for batch in seen for example in batch)
        learned = sum(example.num_learned for batch in seen for example in batch)
        by = "tokens" if evaluates else self.scenario["strategy"]["weight"]
        worked = {"tokens": tokens, "steps": 0 if evaluates else len(seen)}
        if self.secure:  # nobody is told
            return worked
        weight = {"tokens": learned, "examples": len(examples), "equal": 1}[by]
        return worked | {"examples": len(examples), "weight": weight}

    def _examples(self, name: str, which: str) -> list[Example]:
        path = self.folder / "clients" / name / f"{which}.jsonl"
        if path not in self._files:
            length = self.scenario["data"]["max_length"]
            self._files[path] = load_examples(path, byte_tokenizer(), max_length=length)
        return self._files[path]

    def _time(self, found: Row, steps: list[Row], first: bool) -> Row:
        """Virtual seconds and joules, by the client's own network and device."""
        device, network = (self.options[found["client"]][key] for key in ("device", "network"))
        compute_s = found["edge_flops"] / (device["gflops"] * 1e9)
        line_s = _seconds(network, found["wire_up_bytes"], found["wire_down_bytes"], len(steps))
        moving_s = line_s + found["cloud_flops"] / (self.scenario["cloud"]["gflops"] * 1e9)
        moving_s += _seconds(network, found["adapter_up_bytes"], found["adapter_down_bytes"], 1)
        weights_s = _seconds(network, 0, found["weight_bytes"], 1) if first else 0.0
        slow, faults = 1.0, self.scenario["faults"]
        if found["row"] == "client_round" and self._draw("straggler", found) < faults["straggler"]:
            slow = faults["slowdown"]
        return {
            "joules": compute_s * device["watts"],
            "virtual_s": slow * (compute_s + moving_s) + weights_s,
            "network_s": sum(step["network_s"] for step in steps),
            "network_virtual_s": line_s,
        }

    def _status(self, found: Row) -> str:
        """Who dropped out and who was late follows from the seed and the clock."""
        faults, status = self.scenario["faults"], str(found["status"])
        if self._draw("dropout", found) < faults["dropout"] and status != "failed":
            return "dropped"
        if status == "ok" and faults["deadline_s"] and found["virtual_s"] > faults["deadline_s"]:
            return "late"
        return status

    def _draw(self, what: str, found: Row) -> float:
        seed, number, name = self.scenario["seed"], found["round"], found["client"]
        return random.Random(f"{seed}/{what}/{number}/{name}").random()

    def held(self, name: str) -> int:
        """Bytes of what the cloud serves to a client of this cut: all weights but the trunk's."""
        bottom, top = map(int, str(self.options[name]["cut"]).split(":"))
        trunk = {f"block.{index}" for index in range(bottom, self.backbone["num_blocks"] - top)}
        assert trunk <= self.sizes.keys()
        return sum(size for blob, size in self.sizes.items() if blob not in trunk)

    def of(self, kind: str, **wanted: Any) -> list[Row]:
        """Rows with these values."""
        return [r for r in self.work if r["row"] == kind and all(r[k] == v for k, v in wanted.items())]


def _seconds(network: Mapping[str, float], up_bytes: int, down_bytes: int, round_trips: int) -> float:
    rtt_s, loss = network["rtt_ms"] / 1e3, network["loss"]
    tcp = 1460 / rtt_s * math.sqrt(1.5 / loss) if rtt_s and loss else math.inf

    def rate(mbps: float) -> float:
        return min(mbps * 125_000, tcp)

    return round_trips * rtt_s + up_bytes / rate(network["up_mbps"]) + down_bytes / rate(network["down_mbps"])
