"""A run's name belongs to one process at a time, and a start that came to nothing leaves it free."""

import os
from pathlib import Path

import pytest
from torch import nn

from support.edge_runs import Steps, quiet, tiny_llama, tiny_loader, tiny_recipe, train_tiny
from tightbeam.common.errors import (
    BudgetError,
    CloudUnavailableError,
    IdentityError,
    RecipeError,
    TightbeamError,
    UsageError,
)
from tightbeam.edge.modes.budget import Budget
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.folder import RunFolder
from tightbeam.edge.training.recipe_run import train_recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def fail_at_forward(recipe: Recipe, number: int, error: TightbeamError) -> None:
    """Train, over a trunk whose `number`-th forward fails as the cloud's answer would."""
    model, calls = tiny_llama(), list[object]()

    def trunk(module: nn.Module, args: object) -> None:
        calls.append(module)
        if len(calls) == number:
            raise error

    model.get_submodule("model.layers.1").register_forward_pre_hook(trunk)
    train_recipe(recipe, load=tiny_loader(Steps(), model), console=quiet()[0])


def test_a_run_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    recipe, refused = tiny_recipe(tmp_path, train={"steps": 4}), list[str]()

    def once_more(done: int) -> None:
        for resume in (True, False):
            with pytest.raises(UsageError) as caught:
                train_tiny(recipe, resume=resume)
            refused.append(str(caught.value))

    result = train_tiny(recipe, once_more)
    assert len(refused) == 8
    assert all(f"run is in use by process {os.getpid()} on " in line for line in refused)
    assert all("output.name" in line for line in refused)
    rows = [row["row"] for row in read_ledger(result.folder.ledger)]
    assert (rows.count("run"), rows.count("optimizer_step")) == (1, 4)
    assert train_tiny(recipe, resume=True).exit_code == 0


def test_a_start_that_fails_at_its_first_step_leaves_the_name_free(tmp_path: Path) -> None:
    with pytest.raises(IdentityError):
        fail_at_forward(tiny_recipe(tmp_path), 1, IdentityError("Names no tenant."))
    assert not tiny_recipe(tmp_path).run_folder.exists()
    other = tiny_recipe(tmp_path, train={"steps": 1, "lr": 0.5})  # as the cure of another mistake may ask
    assert train_tiny(other).exit_code == 0


def test_what_crossed_in_a_failed_start_stays_in_the_accounts(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, data={"eval_fraction": 0.2}, train={"steps": 1})
    num_evaluations = 2  # batches of the first evaluation
    with pytest.raises(BudgetError):
        fail_at_forward(recipe, num_evaluations + 1, BudgetError("Too small."))
    folder = RunFolder(recipe.run_folder)
    before = read_ledger(folder.ledger)
    assert [row["row"] for row in before] == ["run", "step", "step", "eval"]
    assert not folder.config.exists()
    assert train_tiny(recipe).exit_code == 0
    assert read_ledger(folder.ledger)[: len(before)] == before


def test_a_run_that_has_trained_keeps_its_name(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(CloudUnavailableError):
        fail_at_forward(recipe, 2, CloudUnavailableError("Gone."))
    with pytest.raises(RecipeError, match="already holds a run"):
        train_tiny(recipe)
    assert train_tiny(recipe, resume=True).exit_code == 0


def test_a_resumed_run_that_fails_at_once_keeps_its_name(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(CloudUnavailableError):
        fail_at_forward(recipe, 2, CloudUnavailableError("Gone."))  # before any checkpoint

    def gone(recipe: Recipe) -> None:
        raise CloudUnavailableError("Still gone.")

    model = tiny_llama()
    model.get_submodule("model.layers.1").register_forward_pre_hook(lambda module, args: gone(recipe))
    with pytest.raises(CloudUnavailableError):
        train_recipe(recipe, load=tiny_loader(Steps(), model), resume=True, console=quiet()[0])
    assert train_tiny(recipe, resume=True).exit_code == 0


def test_a_larger_budget_goes_on_with_the_run_as_its_cure_says(tmp_path: Path) -> None:
    small, large = (tiny_recipe(tmp_path, train={"steps": 2, "max_mb": mb}) for mb in (1.0, 2.0))
    assert small.numbers_sha256() == large.numbers_sha256()
    with pytest.raises(BudgetError, match=r"Go on with --resume and a larger train\.max_mb"):
        Budget(1e6).check(1, 1e6, 3)
    with pytest.raises(BudgetError, match=r"Start a run with a larger train\.max_mb"):
        Budget(1e6).check(1, 1e6, 0)
    freezing = {"steps": 2, "freeze_bottom_after": "auto"}  # then it decides what is learned
    small, large = (tiny_recipe(tmp_path, train={**freezing, "max_mb": mb}) for mb in (1.0, 2.0))
    assert small.numbers_sha256() != large.numbers_sha256()
    with pytest.raises(BudgetError, match="Start a run"):
        Budget(1e6, resumable=False).check(1, 1e6, 3)
