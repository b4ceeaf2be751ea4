"""The training loop: recipes, federated clients and comparisons run this one.

An `Objective` says what the loss of a batch is, a `Mode` how the batch gets through the trunk. Files, bars
and trackers are none of the loop's business: they listen to its events.

The loss is the mean over the learned tokens of a whole optimizer step, however they are spread over
micro-batches; with one micro-batch that is exactly `model(**batch).loss`.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.errors import BudgetError, NonFiniteError
from tightbeam.edge.data import Example
from tightbeam.edge.modes.base import Mode
from tightbeam.edge.training.events import (
    Evaluated,
    EvaluationStarted,
    Listener,
    Saved,
    StepDone,
    StepStarted,
    Transferred,
)
from tightbeam.edge.training.objective import Objective
from tightbeam.edge.training.plan import Plan

__all__ = ["Loop", "StepObserver"]


class StepObserver(Protocol):
    """Where the loop reads what the wire did."""

    def drain(self) -> Sequence[StepRow]:
        """Hand over the rows of the steps completed since the last call."""


@dataclass(kw_only=True)
class Loop:
    """Optimizer steps in the order of a plan, with evaluations and checkpoints between them."""

    model: PeftModel
    mode: Mode
    objective: Objective
    plan: Plan
    train: Sequence[Example]
    optimizer: Optimizer
    scheduler: LRScheduler
    emit: Listener
    held_out: Sequence[Sequence[Example]] = ()  # in batches
    save: Callable[[int], Path] | None = None  # writes a checkpoint after so many steps
    wire: StepObserver | None = None
    penalty: Callable[[], Tensor] | None = None  # added to the loss once per optimizer step

    def __post_init__(self) -> None:
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]

    def run(self, first: int = 0, stop: Callable[[], bool] = lambda: False) -> int:
        """Train from step `first` (counted from 0) to the plan's end, or until `stop`; gives the steps done.

        Raises:
            BudgetError: the next step would cost too much; what was done is saved.
            NonFiniteError: a loss or gradient is NaN or infinite; that step is not applied.

        """
        if first == 0:
            self.evaluate(0)
        done = saved = first
        while done < self.plan.total_steps and not stop():
            try:
                self._optimizer_step(done)
            except BudgetError:
                if saved != done:
                    self._checkpoint(done)
                raise
            done += 1
            if self._evaluates_after(done):
                self.evaluate(done)
            if self._is_due(done, self.plan.train.checkpoint_every):
                self._checkpoint(done)
                saved = done
        if saved != done:
            self._checkpoint(done)
        return done

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Mean loss over all learned tokens of the held-out data, if there are any."""
        if not self.held_out:
            return
        self.emit(EvaluationStarted(step=step))
        self.mode.before_evaluation()
        self.model.eval()
        total, learned, tokens, edge_flops = 0.0, 0, 0, 0
        for examples in self.held_out:
            batch = self.objective.batch(examples)
            count = self.objective.num_learned(batch)
            total += float(self.objective.loss(self.mode, batch)) * count
            learned += count
            tokens += int(batch["attention_mask"].sum())
            edge_flops += self.mode.flops(batch)
        self._drain(evaluating=True)
        loss = _finite(total / learned, "evaluation loss", step)
        self.emit(
            Evaluated(step=step, loss=loss, tokens=tokens, learned_tokens=learned, edge_flops=edge_flops)
        )

    def _optimizer_step(self, step: int) -> None:
        """Run one optimizer step; the weights change only when loss and gradients are finite."""
        began_s = time.perf_counter()
        self.emit(StepStarted(step=step + 1, total_steps=self.plan.total_steps))
        self.mode.before_step(step)
        self.model.train()
        groups = self.plan.micro_batches(step)
        batches = [self.objective.batch([self.train[row] for row in rows]) for rows in groups]
        learned = [self.objective.num_learned(batch) for batch in batches]
        loss, edge_flops = 0.0, 0
        for number, (batch, count) in enumerate(zip(batches, learned, strict=True), 1):
            share = self.objective.loss(self.mode, batch) * (count / sum(learned))
            loss += _finite(float(share.detach()), "loss", step + 1)
            if self.penalty is not None and number == len(batches):
                share = share + self.penalty()
            share.backward()
            edge_flops += self.mode.flops(batch)
        limit = self.plan.train.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, limit))
        _finite(norm, "gradient norm", step + 1)
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        wall_s = time.perf_counter() - began_s
        away_s = self._drain()
        self.emit(
            StepDone(
                step=step + 1,
                epoch=(step + 1) / self.plan.steps_per_epoch,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                tokens=tokens,
                learned_tokens=sum(learned),
                wall_s=wall_s,
                edge_s=max(wall_s - away_s, 0.0),
                edge_flops=edge_flops,
                evaluation_follows=self._evaluates_after(step + 1),
            )
        )

    def _checkpoint(self, done: int) -> None:
        if self.save is None:
            return
        if self.mode.before_checkpoint():
            self._drain()
        self.emit(Saved(step=done, path=self.save(done)))

    def _evaluates_after(self, done: int) -> bool:
        return bool(self.held_out) and self._is_due(done, self.plan.train.eval_every)

    def _is_due(self, done: int, every: int) -> bool:
        return done == self.plan.total_steps or (every > 0 and done % every == 0)

    def _drain(self, *, evaluating: bool = False) -> float:
        """Pass on what has crossed; gives the seconds of it that were not the edge's own computing."""
        rows = self.wire.drain() if self.wire else ()
        for row in rows:
            self.emit(Transferred(row=row, evaluating=evaluating))
        return sum((row.blocked_s for row in rows), 0.0)


def _finite(value: float, what: str, step: int) -> float:
    if math.isfinite(value):
        return value
    raise NonFiniteError(
        f"The {what} of optimizer step {step} is {value}; it was not applied and nothing was overwritten.",
        cure="Start a run under another output.name with a lower train.lr, more train.warmup_steps, or "
        "numbers of more bits: model.dtype float32 and codec fp32.",
    )
