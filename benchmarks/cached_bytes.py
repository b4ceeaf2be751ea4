"""Bytes of three epochs of `top` and `side` beside `ushape` in bf16: real model, real texts, a real cloud.

SmolLM2-135M learns the demo's chats at one cut, without evaluation. Bytes are counted twice: those of the
ledger's steps, and all that a TCP proxy between edge and cloud saw in the run, handshakes and pings included.
Nothing but the data decides them, so any machine gives the same figures, however busy.

    PYTHONPATH=tests python -m benchmarks.cached_bytes    # the proxy is the tests' own

Prints a line per run and, last, one JSON line: how much of the bytes of `ushape` each saves, by both counts.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from benchmarks.serving import chats, cloud_process, fitting, insecure_recipe
from rich.console import Console

from support.counting_proxy import CountingProxy
from tightbeam.common.config import Recipe
from tightbeam.common.costs.meter import read_ledger
from tightbeam.edge.run import run_recipe
from tightbeam.simulations.demo_inputs import cache_folder, prepare_model

BASELINE = "ushape-bf16"
RUNS = (BASELINE, "top-bf16", "top-int8", "top-int5", "top-int4", "side-bf16", "side-int8", "side-int4")


def main() -> None:
    """Train each and print what crossed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; SmolLM2 if left out")
    parser.add_argument("--cut", default="4:8")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--runs", default=",".join(RUNS))
    arguments = parser.parse_args()
    model = arguments.model or prepare_model(cache_folder())
    torch.set_num_threads(1)
    found: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = chats(folder, arguments.examples)
        with cloud_process(model, folder, "--insecure", *fitting(folder)) as address:
            for run in arguments.runs.split(","):
                mode, _, codec = run.partition("-")
                with CountingProxy(int(address.rpartition(":")[2])) as proxy:
                    recipe = insecure_recipe(
                        model, f"127.0.0.1:{proxy.port}", data, run,
                        cut=arguments.cut, mode=mode, codec=codec, train={"epochs": arguments.epochs},
                    )  # fmt: skip
                    by_ledger, tokens = _train(recipe)
                    found[run] = by_ledger, sum(proxy.snapshot())
                print(
                    f"{run}: {by_ledger / tokens:.1f} bytes per token of the data, {found[run]}", flush=True
                )
    print(json.dumps(_summary(found, arguments.cut, arguments.epochs)))


def _train(recipe: Recipe) -> tuple[int, int]:
    """Wire bytes of all steps, and tokens of the data."""
    with (recipe.output.dir.parent / "log").open("a") as log:
        result = run_recipe(recipe, console=Console(file=log))
    rows = read_ledger(result.folder.ledger)
    moved = sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in rows if row["row"] == "step")
    seen = sum(row["tokens"] for row in rows if row["row"] == "optimizer_step")
    assert recipe.train.epochs is not None
    return moved, round(seen / recipe.train.epochs)


def _summary(found: dict[str, tuple[int, int]], cut: str, epochs: int) -> dict[str, object]:
    def saved(which: int) -> dict[str, float]:
        whole = found[BASELINE][which]
        return {run: round(1 - bytes_[which] / whole, 4) for run, bytes_ in found.items() if run != BASELINE}

    return {"cut": cut, "epochs": epochs, "saved_by_ledger": saved(0), "saved_by_proxy": saved(1)}


if __name__ == "__main__":
    main()
