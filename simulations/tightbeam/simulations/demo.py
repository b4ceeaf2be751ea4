"""`tightbeam demo`: two edges with different private texts train against one cloud, on one machine.

Cloud and edges are processes of their own that talk over TLS and sealed records, exactly as on three
machines; each edge even fetches its weights itself. This process only watches, asks one question before and
after, and averages the adapters at the end (as a third tenant, `demo`). Everything lands in one new folder:

    <output>/demo-<time>/  certs/  logs/  texts/  quiz/  companion/  average/  report.html  costs.json ...
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tightbeam.common.errors import UsageError
from tightbeam.common.files import atomic_write, cache_folder
from tightbeam.common.identity.authority import init_certificates
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.folder import RunFolder
from tightbeam.federation.runtimes.processes import Child, Children, signals_as_exit
from tightbeam.simulations.averaging import average_adapters
from tightbeam.simulations.demo_inputs import EdgeTexts, prepare_model, prepare_texts

__all__ = ["CUT", "demo_recipe", "run_demo"]

CUT = "4:4"
_BATCH = 8
_READY_S = 180.0
_TRAINING_S = 1800.0
_REPORT_EVERY_S = 10.0
_SERVER = ("serve", "--listen", "127.0.0.1:0")


def run_demo(*, model: str | None, data: Sequence[Path], steps: int, output: Path) -> Path:
    """Run the whole demo and return the path of its report.

    Raises:
        TightbeamError: inputs that cannot be had, or a process that failed; every process is stopped then.

    """
    folder = (output / time.strftime("demo-%Y%m%d-%H%M%S")).absolute()
    own = _own_texts(data) if data else None  # before the model: a wrong file is told at once
    _say("fetching and preparing the model and the texts (only the first time takes long) ...")
    source = model or str(prepare_model(cache_folder()))
    texts = own or prepare_texts(cache_folder(), folder / "texts")
    names = [text.name for text in texts]
    init_certificates(folder / "certs", clients=[*names, "demo"])
    _say(f"logs, adapters and accounts go to {folder}")
    with signals_as_exit(), Children(folder / "logs") as children, tempfile.TemporaryDirectory() as caches:
        cloud = _start_cloud(children, source, folder)
        from tightbeam.simulations.demo_answers import (
            AnswerModel,
        )  # slow: the cloud loads its model meanwhile

        address = cloud.first_answer(_READY_S)
        with AnswerModel(address, folder / "certs" / "demo", source, CUT) as answering:
            results = [_Result(text, answering.answer(text.question)) for text in texts]
            edges = [_start_edge(children, text, address, folder, steps, Path(caches)) for text in texts]
            _say(f"the cloud listens on {address}; {' and '.join(names)} are training, cut {CUT} ...")
            _watch(children, edges, [folder / name for name in names], steps)
            _judge(answering, results, folder)
    _print(results)
    from tightbeam.edge.report.report import write_files
    from tightbeam.edge.report.summary import summarise
    from tightbeam.edge.report.table import print_table

    costs = summarise([folder / name for name in names])
    print_table(costs)
    return write_files(costs, folder)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _own_texts(files: Sequence[Path]) -> list[EdgeTexts]:
    """Name the user's files as the texts of two edges; the question is the first one of each file."""
    if len(files) != 2:
        raise UsageError(f"The demo has two edges, not {len(files)}.", cure="Give --data FILE twice.")
    from tightbeam.edge.data.reading import read_records

    texts = []
    for name, file in zip(("first", "second"), files, strict=True):
        record = read_records(file)[1][0]
        question = next((m["content"] for m in record.messages if m["role"] == "user"), record.text[:80])
        texts.append(EdgeTexts(name, file.absolute(), None, question))
    return texts


@dataclass
class _Result:
    """What one edge's training did."""

    texts: EdgeTexts
    answer_before: str
    answer_after: str = ""
    answer_average: str = ""
    losses: list[float] = field(default_factory=list)  # nats per answer token: before, after, averaged
    tokens: int = 0


def demo_recipe(text: EdgeTexts, address: str, folder: Path, steps: int) -> dict[str, Any]:
    """Return the recipe of one edge, as a user would write it."""
    data: dict[str, Any] = {"train": str(text.train), "max_length": 256}
    data |= {"eval": str(text.evaluation)} if text.evaluation else {"eval_fraction": 0.1}
    return {
        "model": {"cloud": address, "identity": str(folder / "certs" / text.name)},
        "cut": CUT,
        "adapter": {"method": "lora", "r": 16, "alpha": 32},
        "data": data,
        "train": {
            "steps": steps,
            "batch_size": _BATCH,
            "lr": 1e-3,
            "warmup_steps": 2,
            "threads": _threads(),
            "checkpoint_every": 0,
        },
        "output": {"dir": str(folder), "name": text.name, "report": False},
    }


def _threads() -> int:
    """Two cores for three processes: cloud and edges mostly wait for each other."""
    return max((os.cpu_count() or 2) // 2, 1)


def _start_cloud(children: Children, model: str, folder: Path) -> Child:
    options = [
        "--model",
        model,
        "--identity",
        str(folder / "certs" / "cloud"),
        "--ledger",
        str(folder / "cloud.db"),
    ]
    return children.start("cloud", [*_tightbeam(), *_SERVER, *options], {"OMP_NUM_THREADS": str(_threads())})


def _start_edge(
    children: Children, text: EdgeTexts, address: str, folder: Path, steps: int, caches: Path
) -> Child:
    recipe = folder / f"{text.name}.yaml"
    atomic_write(recipe, yaml.safe_dump(demo_recipe(text, address, folder, steps), sort_keys=False))
    env = {"OMP_NUM_THREADS": str(_threads()), "TIGHTBEAM_CACHE": str(caches / text.name)}
    return children.start(text.name, [*_tightbeam(), "train", str(recipe)], env)


def _tightbeam() -> list[str]:
    return [sys.executable, "-m", "tightbeam.cli"]


def _watch(children: Children, edges: list[Child], runs: list[Path], steps: int) -> None:
    said_at = time.monotonic()
    for _ in children.wait(edges, _TRAINING_S):
        if time.monotonic() - said_at > _REPORT_EVERY_S:
            said_at = time.monotonic()
            _say("  " + "   ".join(f"{run.name}: {_progress(run, steps)}" for run in runs))


def _rows(run: Path, kind: str) -> list[dict[str, Any]]:
    ledger = RunFolder(run).ledger
    return [row for row in read_ledger(ledger) if row["row"] == kind] if ledger.exists() else []


def _progress(run: Path, steps: int) -> str:
    rows = _rows(run, "optimizer_step")
    return f"step {rows[-1]['n']} of {steps}, loss {rows[-1]['loss']:.2f}" if rows else "starting"


def _judge(answering: Any, results: list[_Result], folder: Path) -> None:
    """Fill in what each adapter and their mean answer, and the losses."""
    adapters = [RunFolder(folder / result.texts.name).adapter for result in results]
    for result, adapter in zip(results, adapters, strict=True):
        run = folder / result.texts.name
        result.losses = [row["loss"] for row in _rows(run, "eval")]
        result.tokens = sum(row["tokens"] for row in _rows(run, "optimizer_step"))
        answering.wear(adapter, result.texts.name)
        result.answer_after = answering.answer(result.texts.question)
    average = average_adapters(adapters, [result.tokens for result in results], folder / "average")
    answering.wear(average, "average")
    for result in results:
        result.answer_average = answering.answer(result.texts.question)
        if result.texts.evaluation is not None:
            result.losses.append(answering.loss(result.texts.evaluation))


def _print(results: list[_Result]) -> None:
    for result in results:
        before, after, *average = result.losses
        line = f"\n{result.texts.name}: evaluation loss {before:.3f} before, {after:.3f} after"
        _say(line + (f", {average[0]:.3f} with the mean of both adapters" if average else ""))
        _say(f"  asked            {result.texts.question}")
        _say(f"  before           {result.answer_before}")
        _say(f"  after            {result.answer_after}")
        _say(f"  mean of both     {result.answer_average}")
    _say("")
