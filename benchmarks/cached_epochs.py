"""Tokens per second of cached epochs of mode `top` beside `ushape`: same machine, data, cut and batches.

A real cloud process serves SmolLM2-135M on loopback; edge and cloud have one torch thread each, float32,
lossless codec. The data are the demo's chats, answers learned. Runs of `ushape` and `top` alternate, so a
drifting machine moves both. A cached epoch is any after the first: its rows show that nothing crosses.

    python benchmarks/cached_epochs.py             # fetches model and texts on first use, like the demo
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from rich.console import Console

from tightbeam.common.config import Recipe, recipe_from_mapping
from tightbeam.common.costs.meter import read_ledger
from tightbeam.edge.run import run_recipe
from tightbeam.simulations.demo_inputs import cache_folder, prepare_model, prepare_texts


def main() -> None:
    """Print a line per run and the JSON summary last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; SmolLM2 if left out")
    parser.add_argument("--cut", default="4:4")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    model = arguments.model or prepare_model(cache_folder())

    speeds: dict[str, list[float]] = {"ushape": [], "top": []}
    moved: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, _cloud(model, Path(name)) as address:
        data = _chats(Path(name), arguments.examples)
        for turn in range(arguments.rounds):
            for mode, epochs in (("ushape", 1), ("top", 3)):
                recipe = _recipe(model, address, arguments.cut, data, mode, epochs, f"{mode}-{turn}")
                result = run_recipe(recipe, console=Console(file=(Path(name) / "log").open("a")))
                rows = read_ledger(result.folder.ledger)
                first = 0 if mode == "ushape" else -(-arguments.examples // 8)
                speeds[mode] += _speeds(rows, first)
                moved[mode] = _moved(rows, first)
                print(
                    f"{recipe.output.name}: {statistics.median(_speeds(rows, first)):.0f} tok/s", flush=True
                )
    ushape, top = (statistics.median(speeds[mode]) for mode in ("ushape", "top"))
    print(f"{platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}, cut {arguments.cut}")
    print(
        json.dumps(
            {
                "ratio": round(top / ushape, 2),
                "ushape_tokens_per_s": round(ushape, 1),
                "cached_tokens_per_s": round(top, 1),
                "ushape_wire_bytes_per_epoch": moved["ushape"],
                "cached_wire_bytes_in_two_epochs": moved["top"],
            }
        )
    )


def _speeds(rows: list[dict[str, Any]], first: int) -> list[float]:
    """Tokens per second of the optimizer steps from `first` on; the very first one warms up."""
    steps = [row for row in rows if row["row"] == "optimizer_step" and row["n"] > max(first, 1)]
    return [row["tokens"] / row["wall_s"] for row in steps]


def _moved(rows: list[dict[str, Any]], first: int) -> int:
    """Wire bytes of the steps that crossed after optimizer step `first`."""
    kinds = [(row["row"], row.get("n")) for row in rows]
    start = kinds.index(("optimizer_step", first)) + 1 if first else 0
    crossed = [row for row in rows[start:] if row["row"] == "step"]
    return sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in crossed)


def _recipe(model: Path, address: str, cut: str, data: Path, mode: str, epochs: int, name: str) -> Recipe:
    return recipe_from_mapping(
        {
            "model": {"cloud": address, "insecure": True, "local_path": str(model)},
            "cut": cut,
            "mode": mode,
            "adapter": {"r": 16, "alpha": 32},
            "data": {"train": str(data)},
            "train": {"epochs": epochs, "batch_size": 8, "checkpoint_every": 0, "threads": 1},
            "output": {"dir": str(data.parent / "runs"), "name": name, "report": False},
        }
    )


def _chats(folder: Path, count: int) -> Path:
    lines: list[str] = []
    for texts in prepare_texts(cache_folder(), folder):
        lines += texts.train.read_text(encoding="utf-8").splitlines()
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines[:: max(len(lines) // count, 1)][:count]) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def _cloud(model: Path, folder: Path) -> Iterator[str]:
    command = [
        sys.executable, "-m", "tightbeam.cli", "serve", "--model", str(model), "--listen", "127.0.0.1:0",
        "--insecure", "--ledger", str(folder / "ledger.db"), "--dtype", "float32",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
