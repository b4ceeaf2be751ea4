"""A plausible run folder, written row by row as training writes it, for tests of what reads one."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from tightbeam.common.accounts.framing import wire_bytes
from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.edge.report.meter import JsonlLedger

__all__ = ["fake_run"]

HIDDEN_SIZE = 576
HEADER_BYTES = 180
TAG_BYTES = 16
CHUNK_BYTES = 1 << 20
NUM_EVAL_BATCHES = 3


def fake_run(
    folder: Path, *, steps: int = 48, seed: int = 0, epochs: float | None = 3.0, **changes: Any
) -> Path:
    """Write the files of a run of SmolLM2's shape; `changes` go into its run row."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    train = {"epochs": epochs, "steps": None if epochs else steps, "batch_size": 8}
    (folder / "config.yaml").write_text(yaml.safe_dump({"cut": "4:4", "mode": "ushape", "train": train}))
    env = {
        "python": "3.11.7",
        "platform": "macOS-15.1-arm64",
        "device": "cpu",
        "packages": {"torch": "2.13.0"},
    }
    (folder / "env.json").write_text(json.dumps(env))
    with JsonlLedger(folder / "ledger.jsonl") as ledger:
        _Writer(ledger, chance, folder.name).write(steps, changes)
    return folder


class _Writer:
    def __init__(self, ledger: JsonlLedger, chance: random.Random, run: str) -> None:
        self.ledger, self.chance, self.run = ledger, chance, run
        self.now_s = 1_790_000_000.0 + chance.uniform(0, 2)
        self.step = 0

    def write(self, steps: int, changes: dict[str, Any]) -> None:
        run = {
            "row": "run",
            "run": self.run,
            "model": "SmolLM2-135M-Instruct",
            "fingerprint": "5f" * 32,
            "cut": "4:4",
            "codec": "fp32",
            "dtype": "float32",
            "mode": "ushape",
            "hidden_size": HIDDEN_SIZE,
            "num_blocks": 30,
        }
        self._append(run | changes)
        self._append({
            "row": "transfer", "kind": "weights", "name": "edge weights", "wire_up_bytes": 4_000,
            "wire_down_bytes": 227_000_000, "seconds": 2.4,
        })  # fmt: skip
        self._evaluate(0, 3.2)
        for n in range(1, steps + 1):
            self._optimizer_step(n, 1.55 + 1.7 * math.exp(-n / 14) + self.chance.gauss(0, 0.09))
            if n % 12 == 0:
                self._evaluate(n, 1.7 + 1.5 * math.exp(-n / 14))

    def _optimizer_step(self, n: int, loss: float) -> None:
        tokens = self.chance.randint(420, 760)
        edge_s = self.chance.uniform(0.30, 0.42)
        away_s = self._cross("forward", tokens) + self._cross("backward", tokens)
        self.step += 1
        self._append({
            "row": "optimizer_step", "n": n, "loss": loss, "tokens": tokens, "wall_s": edge_s + away_s + 0.01,
            "edge_compute_s": edge_s, "edge_flops": tokens * 190_000_000,
            "peak_memory_bytes": 780_000_000 + 1_000_000 * n,
        }, edge_s)  # fmt: skip

    def _evaluate(self, n: int, loss: float) -> None:
        sizes = [self.chance.randint(400, 700) for _ in range(NUM_EVAL_BATCHES)]
        for tokens in sizes:
            self._cross("forward", tokens)
            self.step += 1
        self._append({"row": "eval", "n": n, "loss": loss, "tokens": sum(sizes)}, 0.2)

    def _cross(self, kind: str, tokens: int) -> float:
        payload = tokens * HIDDEN_SIZE * 4
        chunks = [CHUNK_BYTES] * (payload // CHUNK_BYTES) + [payload % CHUNK_BYTES]
        sealed = [HEADER_BYTES] + [chunk + TAG_BYTES for chunk in chunks]
        work = 2 if kind == "backward" else 1
        seconds = {
            "codec_s": payload / 4e9, "seal_s": payload / 2e9, "network_s": 0.004 + payload / 60e6,
            "cloud_queue_s": self.chance.expovariate(60), "cloud_compute_s": work * tokens * 3.1e-4,
        }  # fmt: skip
        self.now_s += sum(seconds.values())
        row = StepRow(
            run=self.run,
            step=self.step,
            kind=kind,
            tokens=tokens,
            segments=8,
            bytes=StepBytes(
                payload_up_bytes=payload,
                payload_down_bytes=payload,
                sealed_up_bytes=sum(sealed),
                sealed_down_bytes=sum(sealed),
                wire_up_bytes=wire_bytes(sealed, tls=True),
                wire_down_bytes=wire_bytes(sealed, tls=True),
            ),
            cloud_flops=work * tokens * 160_000_000,
            time_unix_s=self.now_s,
        )
        self.ledger.append(row.to_json() | seconds)
        return sum(seconds.values())

    def _append(self, row: dict[str, Any], seconds: float = 0.0) -> None:
        self.now_s += seconds
        self.ledger.append({**row, "time_unix_s": self.now_s})
