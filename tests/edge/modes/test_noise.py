"""`train.noise`: on what a frozen trunk gave, in training alone, and the same again after a crash."""

from pathlib import Path

import pytest
import torch

from support.cached_runs import CrashError, cached_recipe, losses, train_over
from support.in_process import InProcessCloud
from tightbeam.common.errors import RecipeError
from tightbeam.edge.cache.shortcut import add_noise
from tightbeam.edge.comparison.compare import recipe_of
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.folder import RunFolder

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def noisy(folder: Path, noise: float, *, after: float | None = None, cached: bool = True) -> Recipe:
    train = {"noise": noise, "freeze_bottom_after": after, "checkpoint_every": 2}
    mode = "top" if after is None else "ushape"
    return cached_recipe(
        folder, mode=mode, train=train, data={"eval_fraction": 0.2}, cache={"enabled": cached}
    )


def first_eval(run: RunFolder) -> float:
    return float(next(row["loss"] for row in read_ledger(run.ledger) if row["row"] == "eval"))


@pytest.mark.parametrize("after", [None, 0.5])
def test_it_moves_the_training_and_not_the_evaluation(
    cloud: InProcessCloud, tmp_path: Path, after: float | None
) -> None:
    plain, crossing = train_over(cloud, noisy(tmp_path / "a", 0.0, after=after))
    other, noisy_crossing = train_over(cloud, noisy(tmp_path / "b", 0.5, after=after))
    assert first_eval(other.folder) == first_eval(plain.folder)
    before = 0 if after is None else 3  # steps through the trunk, which have none
    assert losses(other.folder)[:before] == losses(plain.folder)[:before]
    assert losses(other.folder)[before] != losses(plain.folder)[before]
    assert len(noisy_crossing.rows) == len(crossing.rows)  # what crosses and is kept is the answer itself


@pytest.mark.parametrize("after", [None, 0.5])
def test_a_crash_resumes_bit_for_bit(cloud: InProcessCloud, tmp_path: Path, after: float | None) -> None:
    """Without a cache, so that there is a crossing to crash in until the end."""
    whole, crossing = train_over(cloud, noisy(tmp_path / "a", 0.5, after=after, cached=False))

    def crash(rows: int) -> None:
        if rows == len(crossing.rows) - 3:
            raise CrashError

    recipe = noisy(tmp_path / "b", 0.5, after=after, cached=False)
    with pytest.raises(CrashError):
        train_over(cloud, recipe, act=crash)
    result, rest = train_over(cloud, recipe, resume=True)
    assert losses(result.folder) == losses(whole.folder)
    assert len(rest.rows) < len(crossing.rows) / 2  # from a checkpoint, not from the start


def test_its_size_is_that_of_the_rows_and_one_enormous_row_does_not_count() -> None:
    torch.manual_seed(0)
    rows_MD = 3.0 * torch.randn(64, 512)
    rows_MD[0] *= 1000
    added_MD = add_noise(rows_MD, 0.25) - rows_MD
    assert float(added_MD[1:].std()) == pytest.approx(0.25 * 3.0, rel=0.03)
    assert float(added_MD[0].std()) == pytest.approx(0.25 * 3.0, rel=0.2)


def test_modes_that_train_through_the_trunk_refuse_it(tmp_path: Path) -> None:
    for mode in ("ushape", "side"):
        with pytest.raises(RecipeError, match=r"train.noise is for mode top"):
            cached_recipe(tmp_path, mode=mode, train={"noise": 0.2})
    recipe = noisy(tmp_path, 0.2)
    kept = {mode: recipe_of(recipe, mode).train.noise for mode in ("ushape", "freeze", "top", "side")}
    assert kept == {"ushape": 0.0, "freeze": 0.2, "top": 0.2, "side": 0.0}
