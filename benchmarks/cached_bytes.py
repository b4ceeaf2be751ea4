"""Bytes of three epochs of `top` and `side` beside `ushape` in bf16: real model, real texts, a real cloud.

SmolLM2-135M learns the demo's chats, and with --jargon the Jargon File's entries as chats cut to 128 tokens,
at one cut, without evaluation. Bytes are counted twice: those of the ledger's steps, and all that a TCP proxy
between edge and cloud saw in the run, handshakes and pings included. `ushape` moves the same in every epoch:
one is measured. Runs that end in -whole send every row, also those that samples of a step have in common.
Nothing but the data decides the bytes, so any machine gives the same figures, however busy.

    PYTHONPATH=tests python -m benchmarks.cached_bytes --jargon FOLDER/train.jsonl

The proxy is the tests' own. FOLDER is what `benchmarks/jargon.py ... chat` wrote. Prints a line per run and,
last, one JSON line per data set: how much of the bytes of `ushape` each run saves, by both counts.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from benchmarks.serving import chats, cloud_process, fitting, insecure_recipe
from rich.console import Console

from support.counting_proxy import CountingProxy
from tightbeam.common.files import cache_folder
from tightbeam.edge.link.stepper import Stepper
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.run import run_recipe
from tightbeam.simulations.demo_inputs import prepare_model

BASELINE = "ushape-bf16"
CODED = ("top-int8", "top-int5", "top-int4", "side-int8", "side-int4")
MAX_LENGTH = 128  # tokens
RUNS = (BASELINE, *CODED, *(f"{run}-whole" for run in CODED))


def main() -> None:
    """Train each and print what crossed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; SmolLM2 if left out")
    parser.add_argument("--cut", default="4:8")
    parser.add_argument("--examples", type=int, default=128, help="of each data set")
    parser.add_argument("--jargon", type=Path, help="the Jargon File in chat form")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--runs", default=",".join(RUNS))
    arguments = parser.parse_args()
    arguments.model = arguments.model or prepare_model(cache_folder())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = {"chats": chats(folder, arguments.examples)}
        if arguments.jargon is not None:
            lines = arguments.jargon.read_text(encoding="utf-8").splitlines()[: arguments.examples]
            texts["jargon"] = folder / "jargon.jsonl"
            texts["jargon"].write_text("\n".join(lines) + "\n", encoding="utf-8")
        with cloud_process(arguments.model, folder, "--insecure", *fitting(folder)) as address:
            summaries = [_measure(data, what, address, arguments) for what, data in texts.items()]
    for summary in summaries:
        print(json.dumps(summary))


def _measure(data: Path, what: str, address: str, arguments: argparse.Namespace) -> dict[str, object]:
    found: dict[str, tuple[int, int]] = {}
    for run in arguments.runs.split(","):
        mode, codec, *form = run.split("-")
        epochs = 1 if run == BASELINE else arguments.epochs
        with CountingProxy(int(address.rpartition(":")[2])) as proxy, _rows(whole=bool(form)):
            name = f"{what}-{run}"
            recipe = insecure_recipe(
                arguments.model, f"127.0.0.1:{proxy.port}", data, name,
                cut=arguments.cut, mode=mode, codec=codec, train={"epochs": epochs},
            )  # fmt: skip
            cut_short = recipe.data.model_copy(update={"max_length": MAX_LENGTH})
            recipe = recipe.model_copy(update={"data": cut_short})
            by_ledger, tokens = _train(recipe)
            more = (arguments.epochs // epochs - 1) * by_ledger
            found[run] = by_ledger + more, sum(proxy.snapshot()) + more
        print(
            f"{what}, {run}: {by_ledger / tokens:.1f} bytes per token of the data, {found[run]}", flush=True
        )

    def saved(which: int) -> dict[str, float]:
        whole = found[BASELINE][which]
        return {run: round(1 - bytes_[which] / whole, 4) for run, bytes_ in found.items() if run != BASELINE}

    return {
        "texts": what, "examples": arguments.examples, "cut": arguments.cut, "epochs": arguments.epochs,
        "saved_by_ledger": saved(0), "saved_by_proxy": saved(1),
    }  # fmt: skip


@contextmanager
def _rows(*, whole: bool) -> Iterator[None]:
    """With `whole` an edge that knows nothing of rows in common."""
    if whole:
        with mock.patch.object(Stepper, "shared_prefixes", return_value=None):
            yield
    else:
        yield


def _train(recipe: Recipe) -> tuple[int, int]:
    """Wire bytes of all steps, and tokens of the data."""
    with (recipe.output.dir.parent / "log").open("a") as log:
        result = run_recipe(recipe, console=Console(file=log))
    rows = read_ledger(result.folder.ledger)
    moved = sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in rows if row["row"] == "step")
    seen = sum(row["tokens"] for row in rows if row["row"] == "optimizer_step")
    assert recipe.train.epochs is not None
    return moved, round(seen / recipe.train.epochs)


if __name__ == "__main__":
    main()
