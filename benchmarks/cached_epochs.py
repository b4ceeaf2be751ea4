"""Tokens per second of cached epochs of `top` and `side` beside `ushape`: same machine, data and batches.

A real cloud process serves SmolLM2-135M on loopback; edge and cloud have one torch thread each, float32,
lossless codec. The data are the demo's chats, answers learned. `side` adapts bottom and top and has a
ladder, `ladder` is `side` with `adapt_bottom: false`. Runs of `ushape` and of the cached modes alternate at
every cut, so a drifting machine moves all. A cached epoch is any after the first: its rows show that nothing
crosses. Operations of edge and cloud stand beside the seconds: they do not depend on what else the machine
does. A summary says which share of a batch's tokens is computed once for several samples.

    python -m benchmarks.cached_epochs             # fetches model and texts on first use, like the demo
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from benchmarks.serving import chats, cloud_process, fitting, insecure_recipe
from rich.console import Console
from transformers import AutoTokenizer

from tightbeam.common.files import cache_folder
from tightbeam.edge.data import Example, load_examples
from tightbeam.edge.model.packed_rows import PackedRows
from tightbeam.edge.modes.registry import MODES as SPECS
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.run import run_recipe
from tightbeam.simulations.demo_inputs import prepare_model

BATCH = 8
MODES: dict[str, dict[str, Any]] = {
    "ushape": {"mode": "ushape"},
    "top": {"mode": "top"},
    "side": {"mode": "side"},
    "ladder": {"mode": "side", "side": {"adapt_bottom": False}},
}


def main() -> None:
    """Print a line per run and a JSON summary per cut last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; SmolLM2 if left out")
    parser.add_argument("--cuts", default="4:8,4:4")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    model = arguments.model or prepare_model(cache_folder())
    torch.set_num_threads(1)

    speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    moved: dict[tuple[str, str], int] = {}
    operations: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = chats(folder, arguments.examples)
        shared = _shared(load_examples(data, AutoTokenizer.from_pretrained(model)))
        with cloud_process(model, folder, "--insecure", *fitting(folder)) as address:
            for turn in range(arguments.rounds):
                for cut in arguments.cuts.split(","):
                    for mode, changes in MODES.items():
                        once = SPECS[changes["mode"]].crosses == "once"
                        epochs = 3 if once else 1
                        recipe = insecure_recipe(
                            model, address, data, f"{mode}-{cut.replace(':', '-')}-{turn}",
                            cut=cut, train={"epochs": epochs}, **changes,
                        )  # fmt: skip
                        result = run_recipe(recipe, console=Console(file=(folder / "log").open("a")))
                        rows = read_ledger(result.folder.ledger)
                        first = -(-arguments.examples // BATCH) if once else 0
                        found = _speeds(rows, first)
                        speeds[cut, mode] += found
                        moved[cut, mode] = _moved(rows, first)
                        operations[cut, mode] = _operations(rows, first)
                        print(f"{recipe.output.name}: {statistics.median(found):.0f} tok/s", flush=True)
    print(f"{platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}")
    for cut in arguments.cuts.split(","):
        medians = {mode: statistics.median(speeds[cut, mode]) for mode in MODES}
        line: dict[str, Any] = {"cut": cut, "share_of_tokens_in_common": round(shared, 3)}
        for mode in list(MODES)[1:]:
            line[f"ratio_{mode}"] = round(medians[mode] / medians["ushape"], 2)
            fewer = operations[cut, "ushape"] / operations[cut, mode]
            line[f"fewer_operations_{mode}"] = round(fewer, 2)
        line |= {f"{mode}_tokens_per_s": round(value, 1) for mode, value in medians.items()}
        line |= {f"{mode}_wire_bytes": moved[cut, mode] for mode in MODES}
        print(json.dumps(line))


def _shared(examples: list[Example]) -> float:
    """Share of the tokens that follow the same tokens as one of an earlier sample of their batch."""
    rows = tokens = 0
    for start in range(0, len(examples), BATCH):
        packed = PackedRows.of_samples(
            (example.input_ids for example in examples[start : start + BATCH]), torch.device("cpu")
        )
        rows, tokens = rows + packed.num_rows, tokens + len(packed.input_ids_N)
    return 1 - rows / tokens


def _speeds(rows: list[dict[str, Any]], first: int) -> list[float]:
    """Tokens per second of the optimizer steps from `first` on; the very first one warms up."""
    steps = [row for row in rows if row["row"] == "optimizer_step" and row["n"] > max(first, 1)]
    return [row["tokens"] / row["wall_s"] for row in steps]


def _operations(rows: list[dict[str, Any]], first: int) -> float:
    """Operations of edge and cloud per token from optimizer step `first` on."""
    steps = [row for row in rows if row["row"] == "optimizer_step" and row["n"] > first]
    cloud = 0 if first else sum(int(row["cloud_flops"]) for row in rows if row["row"] == "step")
    edge, tokens = (sum(int(row[name]) for row in steps) for name in ("edge_flops", "tokens"))
    return (edge + cloud) / tokens


def _moved(rows: list[dict[str, Any]], first: int) -> int:
    """Wire bytes of the steps that crossed after optimizer step `first`."""
    kinds = [(row["row"], row.get("n")) for row in rows]
    start = kinds.index(("optimizer_step", first)) + 1 if first else 0
    crossed = [row for row in rows[start:] if row["row"] == "step"]
    return sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in crossed)


if __name__ == "__main__":
    main()
