"""The training loop: plain PyTorch over any transformers model; a split one trains like a whole one.

The loss is the mean over the learned tokens of a whole optimizer step, however they are spread over
micro-batches; with one micro-batch that is exactly `model(**batch).loss`.

Ctrl-C finishes the step, saves and ends with code 130; a second one ends at once with what was saved before.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.common.errors import BudgetError, NonFiniteError, TightbeamError
from tightbeam.common.files import write_failed
from tightbeam.edge.data import IGNORED, Example, Limits, Splits, collate
from tightbeam.edge.data.reading import read_records
from tightbeam.edge.link.offer import cost_facts
from tightbeam.edge.model.adapters import attach_adapter, method_arguments
from tightbeam.edge.model.export import save_adapter
from tightbeam.edge.modes import mode_for, spec_of, trained_blocks
from tightbeam.edge.modes.base import Job, Mode
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import JsonlLedger, peak_memory_bytes
from tightbeam.edge.side import side_of
from tightbeam.edge.training.checkpoints import (
    Position,
    RandomState,
    latest,
    load_checkpoint,
    save_checkpoint,
)
from tightbeam.edge.training.facts import run_facts
from tightbeam.edge.training.folder import MetricsFile, RunFolder
from tightbeam.edge.training.interrupts import StopRequest
from tightbeam.edge.training.plan import Plan
from tightbeam.edge.training.progress import Notices, TrainingProgress, say
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["INTERRUPTED", "LoadedModel", "StepObserver", "TrainResult", "train_recipe"]

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


class StepObserver(Protocol):
    """Where the loop reads what the wire did."""

    def drain(self) -> Sequence[StepRow]:
        """Hand over the rows of the steps completed since the last call."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model to train, and what the ledger should say about where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    close: Callable[[], None]
    steps: StepObserver | None = None
    name: str = ""
    fingerprint: str = ""
    run: str = ""  # the run's name on the wire; the recipe's output.name when empty
    notices: Notices = field(default_factory=lambda: Notices(Console(stderr=True)))
    ledger_rows: Sequence[dict[str, Any]] = ()  # what loading itself cost: "transfer" rows
    card: Card | None = None  # of the cloud; mode side builds its network after it
    cache_secret: bytes | None = None  # seals the cache of activations; None for an edge without identity


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
        RecipeError: an adapter that does not fit, or a folder that belongs to another run.
        TightbeamError: what `load` and the model's own steps raise.

    """
    console = console or Console(stderr=True)
    with RunFolder(recipe.run_folder).lock(Notices(console)):
        folder = RunFolder.open(recipe, resume=resume)
        for path in filter(None, (recipe.data.train, recipe.data.eval)):
            read_records(path, recipe.data.format)  # before the model is fetched: a bad line is told at once
        method_arguments(recipe.adapter)
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        loaded = load(recipe)
        try:
            return _train(_Training(recipe, loaded, folder, console), resume)
        finally:
            loaded.close()


def _train(training: "_Training", resume: bool) -> TrainResult:
    """Train under the run's name; a start that fails before its first optimizer step does not use it up."""
    folder = training.folder
    folder.claim(training.recipe)  # only now: a wrong file name or an absent cloud has failed already
    try:
        with JsonlLedger(folder.ledger) as training.ledger:
            return training.run(resume)
    except TightbeamError:
        if not resume and not training.tokens:
            folder.disclaim(keep_ledger=training.moved.wire_total_bytes > 0)
        raise


@dataclass
class _Training:
    """One process's share of a run."""

    recipe: Recipe
    loaded: LoadedModel
    folder: RunFolder
    console: Console
    ledger: JsonlLedger = field(init=False)
    mode: Mode = field(init=False)
    moved: StepBytes = field(default_factory=StepBytes)
    step_moved: StepBytes = field(
        default_factory=StepBytes
    )  # since the last optimizer step, evaluations left out
    tokens: int = 0
    wire_bytes_before: int = 0  # by earlier processes of this run
    eval_losses: list[float] = field(default_factory=list)
    last_loss: float | None = None

    def __post_init__(self) -> None:
        card, model, tokenizer = self.loaded.card, self.loaded.model, self.loaded.tokenizer
        limits = Limits.of_model(model.config) if card is None else Limits.of(card)
        data = Splits.load(self.recipe.data, tokenizer, limits)
        for warning in data.warnings:
            say(self.console, warning)
        self.train, self.eval = data.train, data.eval
        self.plan = Plan(len(self.train), self.recipe.train, self.recipe.data.shuffle_seed)
        spec = spec_of(self.recipe)
        once = spec.crosses == "once" and self.recipe.cache.enabled  # later epochs do not cross
        batches = self.plan.batches(self.plan.steps_per_epoch if once else self.plan.total_steps)
        data.check_batches(limits, batches, self.recipe.train.batch_size)
        self.facts = run_facts(self.recipe, model, tokenizer, self.loaded.fingerprint, card)
        self.facts |= data.facts()
        _seed_everything(self.recipe.train.seed)
        self.model: PeftModel = attach_adapter(
            self.loaded.model, self.recipe.adapter, trained_blocks(self.recipe, self.loaded.model)
        )
        spec.extend(self.model, card, self.recipe.side)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        section = self.recipe.train
        # One pass over the numbers instead of a dozen; on a CPU they are most of what a step of AdamW takes.
        fused = self.trained[0].device.type == "cpu"
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=section.lr, weight_decay=section.weight_decay, fused=fused
        )
        self.scheduler = get_scheduler(
            section.schedule if section.schedule != "constant" else "constant_with_warmup",
            self.optimizer,
            num_warmup_steps=section.warmup_steps,
            num_training_steps=self.plan.total_steps,
        )

    def run(self, resume: bool) -> TrainResult:
        """Train from the start or the last checkpoint to the end, or to an interrupt."""
        start = self._resume() if resume else Position()
        self.tokens, self.wire_bytes_before = start.tokens, start.wire_bytes
        self.mode = mode_for(self._job())
        try:
            self.mode.restore(start.mode)
            return self._run(start)
        finally:
            self.mode.close()

    def _run(self, start: Position) -> TrainResult:
        self.metrics = MetricsFile(self.folder.metrics, after_step=start.optimizer_step)
        self._describe()
        with (
            TrainingProgress(
                self.console, total_steps=self.plan.total_steps, done_steps=start.optimizer_step
            ) as progress,
            StopRequest(
                lambda: progress.say("Stopping after this step; Ctrl-C again stops at once.")
            ) as stop,
        ):
            self.progress = progress
            try:
                done = self._steps(start.optimizer_step, stop)
            except KeyboardInterrupt:
                progress.say(f"Stopped at once. --resume goes on from the last of {self.folder.checkpoints}.")
                return self._result(-1, None)
        if stop.requested:
            say(self.console, f"Stopped after step {done}. Go on with --resume.")
            return self._result(done, None)
        adapter = save_adapter(self.folder.adapter, self.model, self.recipe, self.loaded.fingerprint)
        return self._result(done, adapter)

    def _steps(self, first: int, stop: StopRequest) -> int:
        section = self.recipe.train
        if first == 0:
            self._evaluate(0)
        done, saved = first, first
        while done < self.plan.total_steps and not stop.requested:
            try:
                loss_row = self._optimizer_step(done)
            except BudgetError:
                if saved != done:
                    self._checkpoint(done)
                raise
            done += 1
            last = done == self.plan.total_steps
            if last or (section.eval_every and done % section.eval_every == 0):
                loss_row["eval_loss"] = self._evaluate(done)
            self.metrics.append(**{key: value for key, value in loss_row.items() if value is not None})
            if last or (section.checkpoint_every and done % section.checkpoint_every == 0):
                self._checkpoint(done)
                saved = done
        if saved != done:
            self._checkpoint(done)
        return done

    def _optimizer_step(self, step: int) -> dict[str, Any]:
        """Run one optimizer step; the weights change only when loss and gradients are finite."""
        began = time.perf_counter()
        self.loaded.notices.at = f"step {step + 1}/{self.plan.total_steps}"
        self.mode.before_step(step)
        self.model.train()
        batches = [self._batch(self.train, rows) for rows in self.plan.micro_batches(step)]
        learned = [_num_learned(batch) for batch in batches]
        loss, edge_flops = 0.0, 0
        for batch, count in zip(batches, learned, strict=True):
            share = self.mode.loss(batch) * (count / sum(learned))
            loss += _finite(float(share.detach()), "loss", step + 1)
            share.backward()
            edge_flops += self.mode.flops(batch)
        limit = self.recipe.train.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, limit))
        _finite(norm, "gradient norm", step + 1)
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return self._account(step + 1, loss, tokens, time.perf_counter() - began, edge_flops, lr, norm)

    def _account(
        self, step: int, loss: float, tokens: int, wall_s: float, edge_flops: int, lr: float, norm: float
    ) -> dict[str, Any]:
        """Write the ledger's rows of one optimizer step and return its row of metrics."""
        away_s = self._drain()
        self.last_loss, self.tokens = loss, self.tokens + tokens
        self._row(
            "optimizer_step",
            n=step,
            loss=loss,
            tokens=tokens,
            wall_s=wall_s,
            edge_compute_s=max(wall_s - away_s, 0.0),
            edge_flops=edge_flops,
            peak_memory_bytes=peak_memory_bytes(str(self.model.device)),
        )
        up, down = self.moved.wire_up_bytes, self.moved.wire_down_bytes
        self.progress.step(loss=loss, tokens=tokens, wall_s=wall_s, up_bytes=up, down_bytes=down)
        moved, self.step_moved = self.step_moved, StepBytes()
        return {
            "optimizer_step": step,
            "epoch": round(step / self.plan.steps_per_epoch, 4),
            "loss": loss,
            "eval_loss": None,
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "wall_s": round(wall_s, 6),
            "wire_up_bytes": moved.wire_up_bytes,
            "wire_down_bytes": moved.wire_down_bytes,
        }

    @torch.no_grad()
    def _evaluate(self, step: int) -> float | None:
        """Mean loss over all learned tokens of the evaluation data, in nats."""
        if not self.eval:
            return None
        self.loaded.notices.at = f"evaluation after step {step}"
        self.mode.before_evaluation()
        self.model.eval()
        total, learned, tokens = 0.0, 0, 0
        for start in range(0, len(self.eval), self.recipe.train.batch_size):
            rows = range(start, min(start + self.recipe.train.batch_size, len(self.eval)))
            batch = self._batch(self.eval, rows)
            count = _num_learned(batch)
            total += float(self.mode.loss(batch)) * count
            learned += count
            tokens += int(batch["attention_mask"].sum())
        self._drain(evaluating=True)
        loss = _finite(total / learned, "evaluation loss", step)
        self._row("eval", n=step, loss=loss, tokens=tokens)
        self.eval_losses.append(loss)
        self.progress.say(f"evaluation after step {step}: loss {loss:.4f}")
        return loss

    def _batch(self, examples: Sequence[Example], rows: Sequence[int]) -> dict[str, Tensor]:
        batch = collate([examples[row] for row in rows], _pad_id(self.loaded.tokenizer))
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def _resume(self) -> Position:
        path = latest(self.folder.checkpoints, self._warn)
        if path is None:
            say(self.console, f"{self.folder.path} has no checkpoint yet: starting at step 0.")
            return Position()
        say(self.console, f"Going on from {path}.")
        return load_checkpoint(
            path,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            facts=self.facts,
        )

    def _warn(self, line: str) -> None:
        say(self.console, line, "yellow")

    def _job(self) -> Job:
        return Job(
            recipe=self.recipe,
            model=self.model,
            plan=self.plan,
            train=self.train,
            eval=self.eval,
            fingerprint=self.loaded.fingerprint,
            cache_folder=self.recipe.cache.dir or self.folder.path / "cache",
            cache_secret=self.loaded.cache_secret,
            say=self._warn,
            moved_bytes=self._moved_bytes,
        )

    def _moved_bytes(self) -> int:
        return self.wire_bytes_before + self.moved.wire_total_bytes

    def _checkpoint(self, done: int) -> None:
        if self.mode.before_checkpoint():
            self._drain()
        position = self.plan.position(done, self.tokens)
        save_checkpoint(
            self.folder.checkpoints,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            position=replace(position, wire_bytes=self._moved_bytes(), mode=self.mode.state()),
            random_state=RandomState.capture(),
            facts=self.facts,
            keep=self.recipe.train.keep_checkpoints,
        )

    def _describe(self) -> None:
        dtype, device = str(self.model.dtype).removeprefix("torch."), str(self.model.device)
        self.folder.write_env(device=device, dtype=dtype)
        side = side_of(self.model)
        self._row(
            "run",
            run=self.loaded.run or self.recipe.output.name,
            model=self.loaded.name,
            fingerprint=self.loaded.fingerprint,
            cut=self.recipe.cut,
            codec=self.recipe.codec.model_dump(),
            dtype=dtype,
            mode=self.recipe.mode,
            hidden_size=int(self.loaded.model.config.get_text_config().hidden_size),
            **({} if self.loaded.card is None else cost_facts(self.loaded.card, self.recipe.cut)),
            **({} if side is None else {"num_taps": len(side.plan.taps), "tap_size": side.plan.tap_size}),
        )
        for row in self.loaded.ledger_rows:
            self._append(row)

    def _row(self, kind: str, **fields: Any) -> None:
        self._append({"row": kind, **fields, "time_unix_s": time.time()})

    def _append(self, row: dict[str, Any]) -> None:
        try:
            self.ledger.append(row)
        except OSError as error:
            raise write_failed(self.folder.ledger, error) from error

    def _drain(self, *, evaluating: bool = False) -> float:
        """Write the wire's rows; return the seconds of them that were not the edge's own computing."""
        away_s = 0.0
        for row in self.loaded.steps.drain() if self.loaded.steps else ():
            self._append(row.to_json())
            self.moved = self.moved + row.bytes
            self.step_moved = self.step_moved if evaluating else self.step_moved + row.bytes
            away_s += row.blocked_s
        return away_s

    def _result(self, done: int, adapter: Path | None) -> TrainResult:
        return TrainResult(
            folder=self.folder,
            optimizer_steps=done,
            first_eval_loss=self.eval_losses[0] if self.eval_losses else None,
            last_eval_loss=self.eval_losses[-1] if self.eval_losses else None,
            last_loss=self.last_loss,
            adapter=adapter,
            exit_code=0 if adapter else INTERRUPTED,
        )


def _num_learned(batch: dict[str, Tensor]) -> int:
    """Tokens with a loss: the first of each row has none, nothing predicts it."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _finite(value: float, what: str, step: int) -> float:
    if math.isfinite(value):
        return value
    raise NonFiniteError(
        f"The {what} of optimizer step {step} is {value}; it was not applied and nothing was overwritten.",
        cure="Start a run under another output.name with a lower train.lr, more train.warmup_steps, or "
        "model.dtype float32 and codec fp32.",
    )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do where the attention mask is 0; many tokenizers have no padding token of their own."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(candidate for candidate in candidates if isinstance(candidate, int)))


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
