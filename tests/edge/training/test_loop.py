"""The loop alone: what it can be given, and what it tells whom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.edge_runs import byte_tokenizer, tiny_llama, tiny_recipe
from tightbeam.common.errors import NonFiniteError
from tightbeam.edge.data import Example, load_examples
from tightbeam.edge.model.adapters import attach_adapter
from tightbeam.edge.modes.base import Job, Mode
from tightbeam.edge.recipe import CacheSection
from tightbeam.edge.training.events import Evaluated, EvaluationStarted, Event, Saved, StepDone, StepStarted
from tightbeam.edge.training.loop import Loop
from tightbeam.edge.training.objective import CausalLM
from tightbeam.edge.training.plan import Plan
from tightbeam.edge.training.schedule import make_scheduler


def _loop(folder: Path, told: list[Event], **changes: Any) -> Loop:
    recipe = tiny_recipe(folder, train={"steps": 4, "batch_size": 2, "checkpoint_every": 2})
    examples = load_examples(recipe.data.train, byte_tokenizer())
    torch.manual_seed(0)
    model = attach_adapter(tiny_llama(), recipe.adapter)
    plan = Plan(len(examples), recipe.train, 0)
    job = Job(
        cut="1:1", model=model, plan=plan, train=examples, eval=(), fingerprint="",
        cache=CacheSection(), cache_folder=folder, cache_secret=None, say=print, emit=told.append,
        moved_bytes=lambda: 0,
    )  # fmt: skip
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    base: dict[str, Any] = {
        "model": model, "mode": Mode(job), "objective": CausalLM(0, model.device), "plan": plan,
        "train": examples, "optimizer": optimizer,
        "scheduler": make_scheduler(optimizer, recipe.train, plan.total_steps), "emit": told.append,
    }  # fmt: skip
    return Loop(**(base | changes))


def test_listeners_hear_of_everything_in_its_order(tmp_path: Path) -> None:
    told: list[Event] = []
    loop = _loop(tmp_path, told, save=lambda step: tmp_path / f"step-{step}")
    loop.held_out = [loop.train[:2]]
    assert loop.run() == 4
    step = [StepStarted, StepDone]
    evaluation = [EvaluationStarted, Evaluated]
    assert [type(event) for event in told] == [
        *evaluation, *step, *step, Saved, *step, *step, *evaluation, Saved
    ]  # fmt: skip
    done = [event for event in told if isinstance(event, StepDone)]
    assert [event.step for event in done] == [1, 2, 3, 4]
    assert [event.evaluation_follows for event in done] == [False, False, False, True]


def test_a_stopped_loop_has_saved_where_it_is(tmp_path: Path) -> None:
    told: list[Event] = []
    loop = _loop(tmp_path, told, save=lambda step: tmp_path)
    assert loop.run(stop=lambda: any(isinstance(e, StepDone) and e.step == 3 for e in told)) == 3
    assert [event.step for event in told if isinstance(event, Saved)] == [2, 3]


@dataclass(frozen=True)
class _Doubled:
    """Another objective: twice the loss of the next token."""

    inner: CausalLM

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return self.inner.batch(examples)

    def num_learned(self, batch: dict[str, Tensor]) -> int:
        return self.inner.num_learned(batch)

    def loss(self, mode: Mode, batch: dict[str, Tensor]) -> Tensor:
        return 2 * self.inner.loss(mode, batch)


def _first(told: list[Event]) -> StepDone:
    return next(event for event in told if isinstance(event, StepDone))


def test_the_objective_decides_what_is_learned(tmp_path: Path) -> None:
    plain: list[Event] = []
    doubled: list[Event] = []
    _loop(tmp_path, plain).run()
    _loop(tmp_path, doubled, objective=_Doubled(CausalLM(0, torch.device("cpu")))).run()
    assert _first(doubled).loss == pytest.approx(2 * _first(plain).loss)
    assert _first(doubled).grad_norm == pytest.approx(2 * _first(plain).grad_norm, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_penalty_counts_once_per_step_and_not_as_loss(tmp_path: Path, accumulation: int) -> None:
    """Of 3/2 p^2 the gradient is 3 p, however many micro-batches a step has: SGD at 0.1 takes 0.3 p off."""

    def after_a_step(strength: float) -> tuple[float, Tensor]:
        told: list[Event] = []
        loop = _loop(tmp_path, told)
        changes = {"gradient_accumulation": accumulation, "steps": 1, "max_grad_norm": 0}
        loop.plan = replace(loop.plan, train=loop.plan.train.model_copy(update=changes))
        with torch.no_grad():
            for parameter in loop.trained:
                parameter.fill_(0.01)
        loop.penalty = lambda: strength / 2 * torch.cat([p.flatten() for p in loop.trained]).square().sum()
        torch.manual_seed(1)
        loop.run()
        return _first(told).loss, torch.cat([p.detach().flatten() for p in loop.trained])

    (loss, without), (same, within) = after_a_step(0.0), after_a_step(3.0)
    assert loss == same
    assert torch.allclose(within - without, torch.full_like(within, -0.003), atol=1e-7)


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    loop = _loop(tmp_path, [])
    loop.penalty = lambda: torch.tensor(float("inf")) * loop.trained[0].sum()
    before = [p.detach().clone() for p in loop.trained]
    with pytest.raises(NonFiniteError, match="gradient norm of optimizer step 1"):
        loop.run()
    assert all(torch.equal(a, p) for a, p in zip(before, loop.trained, strict=True))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_schedule_that_is_entered_later_goes_on_as_if_never_left(tmp_path: Path, schedule: str) -> None:
    recipe = tiny_recipe(tmp_path, train={"schedule": schedule, "warmup_steps": 2, "lr": 0.3})

    def rates(first: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = make_scheduler(optimizer, recipe.train, 8, first)
        found = []
        for _ in range(first, 8):
            found.append(float(scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
        return found

    whole = rates(0)
    assert whole[0] == 0.0
    assert whole[2] == 0.3
    assert rates(3) == whole[3:]
    assert (whole[-1] < 0.3) is (schedule != "constant")
