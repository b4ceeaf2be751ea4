"""`tightbeam train`: connect, load the split model, train the recipe, write the report."""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tightbeam.common.accounts.rows import StepRow
from tightbeam.edge.link.connection import connect
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import JsonlLedger
from tightbeam.edge.training.folder import RunFolder
from tightbeam.edge.training.progress import Notices, say
from tightbeam.edge.training.recipe_run import LoadedModel, TrainResult, train_recipe

__all__ = ["run_recipe"]


class _Rows:
    """Collects the accounts of the wire until the training loop asks for them; writes what is sent."""

    def __init__(self, ledger: Path) -> None:
        self._ledger, self._sent = ledger, contextlib.ExitStack()
        self._append: Callable[[dict[str, Any]], None] | None = None
        self._steps: list[StepRow] = []
        self.others: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        if row["row"] == "step":
            self._steps.append(StepRow.from_json(row))
        else:
            self.others.append(row)

    def send(self, row: dict[str, Any]) -> None:
        """Write that a step leaves."""
        if self._append is None:  # by the first step the run has its folder
            self._append = self._sent.enter_context(JsonlLedger(self._ledger)).append
        self._append(row)

    def close(self) -> None:
        """Close the ledger."""
        self._sent.close()

    def drain(self) -> Sequence[StepRow]:
        steps, self._steps = self._steps, []
        return steps


def run_recipe(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train `recipe` against its cloud.

    Raises what `connect`, `Cloud.load_model` and `train_recipe` raise.
    """
    console = console or Console(stderr=True)
    result = train_recipe(recipe, load=lambda r: _load(r, console), resume=resume, console=console)
    if result.exit_code == 0:
        for line in _summary(result, with_report=recipe.output.report):
            say(console, line)
    return result


def _summary(result: TrainResult, *, with_report: bool) -> Iterator[str]:
    """What a run gave, what it cost, and where that is; writes the report."""
    from tightbeam.edge.report.report import write_files
    from tightbeam.edge.report.summary import summarise
    from tightbeam.edge.report.table import sum_lines

    folder = result.folder
    losses = [loss for loss in (result.first_eval_loss, result.last_eval_loss) if loss is not None]
    evaluated = f"; evaluation loss {' to '.join(f'{loss:.4f}' for loss in losses)}" if losses else ""
    trained = "nothing left to train" if result.last_loss is None else f"loss {result.last_loss:.4f}"
    yield f"Done: {result.optimizer_steps} optimizer steps, {trained}{evaluated}."
    costs = summarise([folder.path])
    yield from sum_lines(costs)[:1]
    yield f"Adapter: {result.adapter}"
    if with_report:
        yield f"Report: {write_files(costs, folder.path)}"
    else:
        yield f"Report: `tightbeam report {folder.path}` writes it."


def _load(recipe: Recipe, console: Console) -> LoadedModel:
    section, rows, notices = recipe.model, _Rows(RunFolder(recipe.run_folder).ledger), Notices(console)
    # A new name for every start: steps computed again after a crash are new work, and are billed as such.
    run = f"{recipe.output.name}-{uuid.uuid4().hex[:8]}"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def on_download(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(f"fetching {name}", total=total)
            progress.update(tasks[name], completed=done)

        cloud = connect(
            section.cloud,
            identity=section.identity,
            insecure=section.insecure,
            fingerprint=section.fingerprint,
            run=run,
            on_row=rows.add,
            on_send=rows.send,
            on_retry=notices,
            on_download=on_download,
        )
        try:
            model = cloud.load_model(
                recipe.cut,
                codec=recipe.codec,
                dtype=section.dtype,
                device=section.device,
                local_path=section.local_path,
            )
            tokenizer = cloud.load_tokenizer()
        except BaseException:
            cloud.close()
            raise

    def close() -> None:
        cloud.close()
        rows.close()

    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        close=close,
        steps=rows,
        name=cloud.card.model,
        fingerprint=cloud.card.fingerprint,
        run=run,
        notices=notices,
        ledger_rows=rows.others,
        card=cloud.card,
        cache_secret=cloud.cache_secret,
    )
