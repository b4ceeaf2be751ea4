"""Small federations: a random Llama of six blocks, sums as texts, and clients in this process."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flwr.app import Context, Message, MetricRecord
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file

from support.commands import Command
from support.edge_runs import byte_tokenizer, tiny_llama, write_jsonl
from tightbeam.edge.report.meter import read_ledger
from tightbeam.federation.runtimes.grid import ClientCall
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.simulations.client_app import app
from tightbeam.simulations.experiment import run_apps, run_scenario

__all__ = ["TOPICS", "Playground", "Signed", "figures", "losing_texts", "save_backbone", "spoiled", "sums"]

TOPICS = ("plus", "minus", "times")
NUM_BLOCKS = 6


def save_backbone(folder: Path) -> Path:
    """A checkpoint with its tokenizer."""
    tiny_llama(num_hidden_layers=NUM_BLOCKS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def sums(count: int) -> list[dict[str, str]]:
    """Questions on three topics, of different lengths."""
    signs = dict(zip(TOPICS, "+-*", strict=True))
    rows = []
    for number in range(count):
        topic = TOPICS[number % 3]
        answer = {"plus": number + 3, "minus": number - 3, "times": number * 3}[topic]
        rows.append({"prompt": f"{number} {signs[topic]} 3 =", "completion": f"{answer}", "topic": topic})
    return rows


def figures(message: Message, **changed: float) -> MetricRecord:
    """What a sound client tells of itself in a reply to this message."""
    counts = [
        "tokens", "learned-tokens", "payload-up-bytes", "payload-down-bytes", "wire-up-bytes",
        "wire-down-bytes", "cloud-flops", "examples", "steps", "weight-bytes", "edge-flops", "weight",
        "memory-bytes",
    ]  # fmt: skip
    told: dict[str, float] = dict.fromkeys(counts, 1)
    reals = ("loss", "wall-s", "edge-s", "network-s", "network-virtual-s", "virtual-s", "joules")
    told |= dict.fromkeys(reals, 1.0)
    if message.metadata.message_type == "train":
        told["adapter-up-bytes"] = 1
    return MetricRecord(dict(told | changed))


class Playground:
    """Runs scenarios against one cloud; results are read back from their folders."""

    def __init__(self, address: str, folder: Path, backbone: Path) -> None:
        self.address, self.folder, self.backbone = address, folder, backbone
        self.data = write_jsonl(folder / "sums.jsonl", sums(72))
        self._count = 0

    def scenario(self, **changes: Any) -> Scenario:
        """Three clients, two rounds of two steps; `changes` are sections merged over it."""
        self._count += 1
        base: dict[str, Any] = {
            "clients": 3,
            "rounds": 2,
            "threads": 1,
            "data": {"source": str(self.data), "max_length": 48},
            "client": {"cut": "1:1", "r": 4, "network": "lan"},
            "train": {"steps": 2, "batch_size": 4, "lr": 1e-2},
            "cloud": {"address": self.address, "insecure": True},
            "output": {"dir": str(self.folder), "name": f"federation-{self._count}"},
        }
        for name, value in changes.items():
            base[name] = {**base[name], **value} if isinstance(base.get(name), dict) else value
        return scenario_from_mapping(base)

    def run(self, scenario: Scenario, *, resume: bool = False, shape: bool = False) -> str:
        """Run it, report included; gives what it printed."""
        text = io.StringIO()
        run_scenario(scenario, resume=resume, shape=shape, console=Console(file=text, width=300))
        return text.getvalue()

    def run_with(self, scenario: Scenario, client: ClientCall, *, shape: bool = False) -> str:
        """Run it with another client app, without a report."""
        text, identities = io.StringIO(), scenario.cloud.identities
        console = Console(file=text, width=300)
        run_apps(scenario, self.address, identities, console=console, client_app=client, shape=shape)
        return text.getvalue()

    @staticmethod
    def run_and_kill(scenario: Scenario, after: str = "state/round-1.json") -> None:
        """Run it in a process of its own; SIGKILL as soon as it has written `after`."""
        path = scenario.folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(scenario.model_dump(mode="json")), encoding="utf-8")
        command = Command(path.parent, "simulate", str(path))
        command.wait_until((scenario.folder / after).exists, 240.0)
        command.kill()

    @staticmethod
    def rows(scenario: Scenario, kind: str) -> list[dict[str, Any]]:
        """Rows of the server's ledger."""
        return [row for row in read_ledger(scenario.folder / "ledger.jsonl") if row["row"] == kind]

    @staticmethod
    def state(scenario: Scenario, number: int | None = None) -> dict[str, NDArray[np.float64]]:
        """The global adapter after a round, in float64 with the scale in B; the last one's by default."""
        wanted = scenario.rounds if number is None else number
        arrays = load_file(scenario.folder / "state" / f"round-{wanted}.safetensors")
        return {name: array for name, array in arrays.items() if name.startswith("global/")}

    @staticmethod
    def report(scenario: Scenario) -> dict[str, Any]:
        """What `federation.json` says."""
        found: dict[str, Any] = json.loads((scenario.folder / "federation.json").read_text(encoding="utf-8"))
        return found


class Signed:
    """Federations whose clients have identities; there are five."""

    def __init__(self, playground: Playground, certs: Path) -> None:
        self.playground, self.certs = playground, certs

    def scenario(self, **changes: Any) -> Scenario:
        """Four clients with their certificates."""
        cloud = {"insecure": False, "identities": str(self.certs)}
        return self.playground.scenario(**{"clients": 4, **changes}, cloud=cloud)

    def run(self, **changes: Any) -> Scenario:
        """Run such a scenario."""
        scenario = self.scenario(**changes)
        self.playground.run(scenario)
        return scenario


def spoiled(spoil: Callable[[int, Message], None]) -> ClientCall:
    """The real client app, but `spoil` may change each reply; it hears the client's number."""

    def call(message: Message, context: Context) -> Message:
        reply = app(message, context)
        spoil(int(context.node_config["partition-id"]), reply)
        return reply

    return call


def losing_texts(scenario: Scenario, client: str) -> ClientCall:
    """The real client app, but this client's texts are gone once the run has begun: it fails."""
    return spoiled(
        lambda number, reply: (scenario.folder / "clients" / client / "train.jsonl").unlink(missing_ok=True)
    )
