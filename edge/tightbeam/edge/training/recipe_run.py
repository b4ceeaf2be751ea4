"""One run of a recipe: its data, adapter and optimizer, the loop over them, and the folder that keeps it all.

Ctrl-C finishes the step, saves and ends with code 130; a second one ends at once with what was saved before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from tightbeam.common.errors import TightbeamError
from tightbeam.edge.data.reading import read_records
from tightbeam.edge.link.offer import asked_by
from tightbeam.edge.model.adapters import method_arguments
from tightbeam.edge.model.export import save_adapter
from tightbeam.edge.modes import spec_of
from tightbeam.edge.modes.base import Job
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import JsonlLedger
from tightbeam.edge.training.checkpoints import (
    Position,
    RandomState,
    latest,
    load_checkpoint,
    save_checkpoint,
)
from tightbeam.edge.training.events import Listeners
from tightbeam.edge.training.folder import MetricsFile, RunFolder
from tightbeam.edge.training.interrupts import StopRequest
from tightbeam.edge.training.listeners import LedgerRows, MetricsRows, ProgressLines, Tally
from tightbeam.edge.training.loaded import LoadedModel
from tightbeam.edge.training.loop import Loop
from tightbeam.edge.training.objective import CausalLM, pad_id
from tightbeam.edge.training.progress import Notices, TrainingProgress, say
from tightbeam.edge.training.setup import Setup
from tightbeam.edge.training.trackers import Trackers, require_trackers

__all__ = ["INTERRUPTED", "LoadedModel", "TrainResult", "train_recipe"]

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    folder: RunFolder
    optimizer_steps: int
    first_eval_loss: float | None  # of this process, nats per learned token; None without evaluation data
    last_eval_loss: float | None
    last_loss: float | None
    adapter: Path | None  # None when the run was interrupted
    exit_code: int = 0


def train_recipe(
    recipe: Recipe,
    *,
    load: Callable[[Recipe], LoadedModel],
    resume: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Train the recipe's adapter and fill its run folder.

    Raises:
        DataError: no usable example.
        NonFiniteError: a loss or gradient is NaN or infinite; that step is not applied.
        RecipeError: an adapter that does not fit, a tracker that is not installed, or a folder that belongs
            to another run.
        TightbeamError: what `load` and the model's own steps raise.

    """
    console = console or Console(stderr=True)
    require_trackers(recipe.train.report_to)
    with RunFolder(recipe.run_folder).lock(Notices(console)):
        folder = RunFolder.open(recipe, resume=resume)
        for path in filter(None, (recipe.data.train, recipe.data.eval)):
            read_records(path, recipe.data.format)  # before the model is fetched: a bad line is told at once
        method_arguments(recipe.adapter)
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        loaded = load(recipe)
        try:
            return _train(_RecipeRun(recipe, loaded, folder, console), resume)
        finally:
            loaded.close()


def _train(run: "_RecipeRun", resume: bool) -> TrainResult:
    """Train under the run's name; a start that fails before its first optimizer step does not use it up."""
    folder = run.folder
    folder.claim(run.recipe)  # only now: a wrong file name or an absent cloud has failed already
    try:
        with JsonlLedger(folder.ledger) as ledger:
            return run.train(ledger, resume)
    except TightbeamError:
        if not resume and not run.tally.tokens:
            folder.disclaim(keep_ledger=run.tally.wire_bytes > 0)
        raise


class _RecipeRun:
    """One process's share of a run."""

    def __init__(self, recipe: Recipe, loaded: LoadedModel, folder: RunFolder, console: Console) -> None:
        self.recipe, self.loaded, self.folder, self.console = recipe, loaded, folder, console
        self.tally = Tally()
        self.setup = Setup.of(
            recipe,
            loaded.model,
            loaded.tokenizer,
            fingerprint=loaded.fingerprint,
            card=loaded.card,
            warn=lambda line: say(console, line),
        )
        self.model, self.plan = self.setup.model, self.setup.plan

    def train(self, ledger: JsonlLedger, resume: bool) -> TrainResult:
        """Train from the start or the last checkpoint to the end, or to an interrupt."""
        start = self._resume() if resume else Position()
        self.tally.tokens, self.tally.wire_bytes = start.tokens, start.wire_bytes
        rows = LedgerRows(ledger, self.folder.ledger, str(self.model.device))
        listeners = Listeners([rows, self.tally])
        self.mode = spec_of(self.recipe).build(self._job(listeners))
        try:
            self.mode.restore(start.mode)
            listeners.append(MetricsRows(MetricsFile(self.folder.metrics, after_step=start.optimizer_step)))
            self._describe(rows)
            with self._trackers(start.optimizer_step) as trackers:
                listeners.append(trackers)
                return self._run(start.optimizer_step, listeners)
        finally:
            self.mode.close()

    def _trackers(self, first: int) -> Trackers:
        card = self.loaded.card
        prices, cloud = (None, "") if card is None else (asked_by(card), card.device)
        devices = str(self.model.device), cloud
        return Trackers(self.recipe, self.folder, first_step=first, prices=prices, devices=devices)

    def _run(self, first: int, listeners: Listeners) -> TrainResult:
        total = self.plan.total_steps
        with (
            TrainingProgress(self.console, total_steps=total, done_steps=first) as progress,
            StopRequest(
                lambda: progress.say("Stopping after this step; Ctrl-C again stops at once.")
            ) as stop,
        ):
            listeners.append(ProgressLines(progress, self.loaded.notices))
            try:
                done = self._loop(listeners).run(first, lambda: stop.requested)
            except KeyboardInterrupt:
                progress.say(f"Stopped at once. --resume goes on from the last of {self.folder.checkpoints}.")
                return self._result(-1, None)
        if stop.requested:
            say(self.console, f"Stopped after step {done}. Go on with --resume.")
            return self._result(done, None)
        adapter = save_adapter(self.folder.adapter, self.model, self.recipe, self.loaded.fingerprint)
        return self._result(done, adapter)

    def _loop(self, listeners: Listeners) -> Loop:
        held_out, size = self.setup.data.eval, self.recipe.train.batch_size
        return Loop(
            model=self.model,
            mode=self.mode,
            objective=CausalLM(pad_id(self.loaded.tokenizer), self.model.device),
            plan=self.plan,
            train=self.setup.data.train,
            held_out=[held_out[row : row + size] for row in range(0, len(held_out), size)],
            optimizer=self.setup.optimizer,
            scheduler=self.setup.scheduler,
            emit=listeners,
            save=self._save,
            wire=self.loaded.steps,
        )

    def _job(self, listeners: Listeners) -> Job:
        return Job(
            cut=self.recipe.cut,
            cache=self.recipe.cache,
            model=self.model,
            plan=self.plan,
            train=self.setup.data.train,
            eval=self.setup.data.eval,
            fingerprint=self.loaded.fingerprint,
            cache_folder=self.recipe.cache.dir or self.folder.path / "cache",
            cache_secret=self.loaded.cache_secret,
            say=self._warn,
            emit=listeners,
            moved_bytes=lambda: self.tally.wire_bytes,
        )

    def _resume(self) -> Position:
        path = latest(self.folder.checkpoints, self._warn)
        if path is None:
            say(self.console, f"{self.folder.path} has no checkpoint yet: starting at step 0.")
            return Position()
        say(self.console, f"Going on from {path}.")
        return load_checkpoint(
            path,
            model=self.model,
            optimizer=self.setup.optimizer,
            scheduler=self.setup.scheduler,
            facts=self.setup.facts,
        )

    def _save(self, done: int) -> Path:
        position = self.plan.position(done, self.tally.tokens)
        return save_checkpoint(
            self.folder.checkpoints,
            model=self.model,
            optimizer=self.setup.optimizer,
            scheduler=self.setup.scheduler,
            position=replace(position, wire_bytes=self.tally.wire_bytes, mode=self.mode.state()),
            random_state=RandomState.capture(),
            facts=self.setup.facts,
            keep=self.recipe.train.keep_checkpoints,
        )

    def _describe(self, rows: LedgerRows) -> None:
        """Write what the report must know of this process: versions, device, model, prices."""
        dtype, device = str(self.model.dtype).removeprefix("torch."), str(self.model.device)
        self.folder.write_env(device=device, dtype=dtype)
        rows.write("run", **self.loaded.facts(self.recipe, self.model))
        for row in self.loaded.ledger_rows:
            rows.append(row)

    def _warn(self, line: str) -> None:
        say(self.console, line, "yellow")

    def _result(self, done: int, adapter: Path | None) -> TrainResult:
        losses = self.tally.eval_losses
        return TrainResult(
            folder=self.folder,
            optimizer_steps=done,
            first_eval_loss=losses[0] if losses else None,
            last_eval_loss=losses[-1] if losses else None,
            last_loss=self.tally.last_loss,
            adapter=adapter,
            exit_code=0 if adapter else INTERRUPTED,
        )
