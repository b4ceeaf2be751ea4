"""A client's work in one message: local steps, or an evaluation, in any mode of the product.

The modes are those of `tightbeam train`. What crosses once is kept in the client's own sealed cache, which is
opened for one message and closed again: a simulated client must not hold files while others work.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tightbeam.common.accounts.rows import StepRow
from tightbeam.edge.data import Example
from tightbeam.edge.modes import MODES
from tightbeam.edge.modes.base import Job, Mode
from tightbeam.edge.recipe import CacheSection, TrainSection
from tightbeam.edge.report.meter import peak_memory_bytes
from tightbeam.edge.training.events import Evaluated, Event, StepDone
from tightbeam.edge.training.loop import Loop
from tightbeam.edge.training.objective import CausalLM
from tightbeam.edge.training.plan import Plan
from tightbeam.edge.training.schedule import make_scheduler
from tightbeam.federation.client.adapter import SplitAdapter
from tightbeam.federation.client.lender import AdapterShape

__all__ = ["CachePlace", "LocalTask", "Work", "Workplace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTask:
    """One client's work in one round."""

    steps: int  # optimizer steps
    batch_size: int
    lr: float
    optimizer: str  # "adamw" or "sgd", both without weight decay
    max_grad_norm: float  # 0 does not clip
    proximal: float  # FedProx's mu
    first_step: int  # where in the client's own order of examples this round begins
    order_seed: int
    dropout_seed: int
    only_B: bool = False  # FFA: A is frozen
    gradient_accumulation: int = 1
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    warmup_steps: int = 0
    scheduled_steps: int = 0  # of all rounds, for the schedule
    noise: float = 0.0

    @property
    def section(self) -> TrainSection:
        """As a recipe says it: all steps up to the end of this round."""
        return TrainSection(
            steps=self.first_step + self.steps,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            lr=self.lr,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            max_grad_norm=self.max_grad_norm,
            noise=self.noise,
        )


@dataclass(frozen=True, slots=True)
class CachePlace:
    """A client's own activation cache."""

    folder: Path
    secret: bytes | None  # of its identity
    max_gb: float  # 10^9 bytes; 0 keeps nothing


@dataclass(kw_only=True)
class Work:
    """What a client did, for its ledger and for the report."""

    loss: float = 0.0  # mean over learned tokens, nats
    tokens: int = 0  # worked on, whether they crossed or not
    learned_tokens: int = 0
    steps: int = 0
    edge_flops: int = 0
    wall_s: float = 0.0
    edge_s: float = 0.0  # of them, not waiting for the cloud
    memory_bytes: int = 0  # the most that this process has held
    rows: list[StepRow] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        """Add a step or an evaluation of the training loop."""
        if isinstance(event, StepDone | Evaluated):
            learned = self.learned_tokens + event.learned_tokens
            self.loss = (self.loss * self.learned_tokens + event.loss * event.learned_tokens) / learned
            self.learned_tokens = learned
            self.tokens += event.tokens
            self.edge_flops += event.edge_flops
            self.steps += isinstance(event, StepDone)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """A dressed adapter with what its mode needs."""

    lent: SplitAdapter
    shape: AdapterShape
    fingerprint: str  # of the backbone
    pad_id: int
    cache: CachePlace
    frozen: bool = False  # the bottom keeps what it has learned and learns no more

    def plan_tokens(self, examples: Sequence[Example], task: LocalTask) -> int:
        """Tokens that `train` will send, padding left out."""
        with self._mode(task, train=examples) as mode:
            return sum(len(e.input_ids) for e in mode.crossing(_flat(examples, task)))

    def planned_flops(self, examples: Sequence[Example], task: LocalTask) -> int:
        """Operations that `train` will take at the edge."""
        with self._mode(task, train=examples) as mode:
            filling = mode.filling_flops(mode.crossing(_flat(examples, task)))
            return filling + sum(
                mode.flops(self._objective.batch(batch)) for batch in _batches(examples, task)
            )

    @torch.no_grad()
    def planned_evaluation(self, examples: Sequence[Example], batch_size: int) -> tuple[int, int]:
        """Tokens that `evaluate` will send, and operations that it will take at the edge."""
        with self._mode(_no_steps(batch_size), held_out=examples) as mode:
            crossing = mode.crossing(examples)
            flops = mode.filling_flops(crossing)
            flops += sum(
                mode.flops(self._objective.batch(batch)) for batch in _by_length(examples, batch_size)
            )
        return sum(len(example.input_ids) for example in crossing), flops

    def train(self, examples: Sequence[Example], task: LocalTask, rows: list[StepRow]) -> Work:
        """Run the task's steps; `rows` is where the connection puts the accounts of its steps.

        Raises `NonFiniteError` for a loss or gradient that is not finite, and what the steps raise.
        """
        began_s, work = time.perf_counter(), Work(rows=rows)
        torch.manual_seed(task.dropout_seed)
        with self._mode(task, train=examples) as mode:
            work.edge_flops = mode.filling_flops(mode.crossing(_flat(examples, task)))
            trained = [p for p in self.lent.model.parameters() if p.requires_grad]
            penalty = _proximal(trained, task.proximal) if task.proximal else None
            self._loop(mode, examples, trained, task, work, penalty=penalty).run(task.first_step)
        return self._finish(work, began_s)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], batch_size: int, rows: list[StepRow]) -> Work:
        """Mean loss over all learned tokens of the examples."""
        began_s, work = time.perf_counter(), Work(rows=rows)
        task, batches = _no_steps(batch_size), _by_length(examples, batch_size)
        with self._mode(task, held_out=examples) as mode:
            work.edge_flops, work.steps = mode.filling_flops(mode.crossing(examples)), len(batches)
            trained = list(self.lent.model.parameters())
            self._loop(mode, (), trained, task, work, held_out=batches).evaluate(0)
        return self._finish(work, began_s)

    def _loop(
        self,
        mode: Mode,
        examples: Sequence[Example],
        trained: list[nn.Parameter],
        task: LocalTask,
        work: Work,
        *,
        held_out: Sequence[Sequence[Example]] = (),
        penalty: Callable[[], Tensor] | None = None,
    ) -> Loop:
        make = torch.optim.AdamW if task.optimizer == "adamw" else torch.optim.SGD
        optimizer = make(trained, lr=task.lr, weight_decay=0.0)
        return Loop(
            model=self.lent.model,
            mode=mode,
            objective=self._objective,
            plan=mode.job.plan,
            train=examples,
            held_out=held_out,
            optimizer=optimizer,
            scheduler=make_scheduler(optimizer, task.section, task.scheduled_steps, task.first_step),
            emit=work,
            penalty=penalty,
        )

    @contextmanager
    def _mode(
        self, task: LocalTask, *, train: Sequence[Example] = (), held_out: Sequence[Example] = ()
    ) -> Iterator[Mode]:
        """The mode of one message, at whose end its cache is written and released."""
        spec, keep_gb = MODES[self.shape.mode], self.cache.max_gb
        self.lent.learn(only_B=task.only_B, only_above=self.frozen and spec.has_side)
        job = Job(
            cut=self.shape.cut,
            cache=CacheSection(max_gb=keep_gb) if keep_gb else CacheSection(enabled=False),
            model=self.lent.model,
            plan=Plan(len(train), task.section, task.order_seed),
            train=train,
            eval=held_out,
            fingerprint=self.fingerprint,
            cache_folder=self.cache.folder,
            cache_secret=self.cache.secret,
            say=lambda line: None,
            emit=lambda event: None,
            moved_bytes=lambda: 0,
        )
        mode = spec.build(job, task.first_step, frozen=self.frozen)
        try:
            yield mode
        finally:
            mode.close()

    @property
    def _objective(self) -> CausalLM:
        return CausalLM(self.pad_id, self.lent.parts.device)

    def _finish(self, work: Work, began_s: float) -> Work:
        work.wall_s = time.perf_counter() - began_s
        work.edge_s = max(work.wall_s - sum(row.blocked_s for row in work.rows), 0.0)
        work.memory_bytes = peak_memory_bytes(str(self.lent.parts.device))
        return work


def _no_steps(batch_size: int) -> LocalTask:
    """An evaluation trains nothing."""
    return LocalTask(
        steps=1, batch_size=batch_size, lr=1.0, optimizer="sgd", max_grad_norm=0, proximal=0,
        first_step=0, order_seed=0, dropout_seed=0,
    )  # fmt: skip


def _by_length(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Batches with little padding."""
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _batches(examples: Sequence[Example], task: LocalTask) -> list[list[Example]]:
    plan = Plan(len(examples), task.section, task.order_seed)
    steps = range(task.first_step, task.first_step + task.steps)
    return [[examples[row] for row in rows] for step in steps for rows in plan.micro_batches(step)]


def _flat(examples: Sequence[Example], task: LocalTask) -> list[Example]:
    return [example for batch in _batches(examples, task) for example in batch]


def _proximal(trained: list[nn.Parameter], mu: float) -> Callable[[], Tensor]:
    """FedProx's term: mu/2 times the squared distance from where the round began."""
    anchor = [p.detach().clone() for p in trained]

    def penalty() -> Tensor:
        drift = sum((p - a).square().sum() for p, a in zip(trained, anchor, strict=True))
        return mu / 2 * torch.as_tensor(drift)

    return penalty
