"""`train.report_to`: what TensorBoard reads back is what the run's own files say."""

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.edge_runs import quiet, tiny_recipe, train_tiny
from tightbeam.common.accounts.prices import Prices
from tightbeam.common.errors import RecipeError
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.folder import RunFolder
from tightbeam.edge.training.recipe_run import LoadedModel, train_recipe

TRACKED = {"report_to": ["tensorboard"], "steps": 6, "eval_every": 3, "checkpoint_every": 2}


class CrashError(Exception):
    """What a test throws into a run in place of a power cut."""


def _recipe(folder: Path) -> Recipe:
    return tiny_recipe(folder, data={"eval_fraction": 0.2}, train=TRACKED)


def _scalars(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_figures_of_the_run(tmp_path: Path) -> None:
    folder = train_tiny(_recipe(tmp_path)).folder
    scalars, rows = _scalars(folder), read_ledger(folder.ledger)
    with folder.metrics.open(encoding="utf-8", newline="") as file:
        metrics = list(csv.DictReader(file))
    for name in ("loss", "lr", "grad_norm"):
        assert [step for step, _ in scalars[f"train/{name}"]] == [1, 2, 3, 4, 5, 6]
        assert [v for _, v in scalars[f"train/{name}"]] == pytest.approx([float(m[name]) for m in metrics])
    steps = [row for row in rows if row["row"] == "optimizer_step"]
    speed = [row["tokens"] / row["wall_s"] for row in steps]
    assert [v for _, v in scalars["train/tokens_per_s"]] == pytest.approx(speed)
    assert [step for step, _ in scalars["eval/loss"]] == [0, 3, 6]
    evals = [row["loss"] for row in rows if row["row"] == "eval"]
    assert [v for _, v in scalars["eval/loss"]] == pytest.approx(evals)


def test_costs_are_sums_over_the_whole_run_by_the_prices_that_count(tmp_path: Path) -> None:
    folder = train_tiny(_recipe(tmp_path)).folder
    costs = {tag: values[-1][1] for tag, values in _scalars(folder).items() if tag.startswith("costs/")}
    rows = read_ledger(folder.ledger)
    last = max(i for i, row in enumerate(rows) if row["row"] == "optimizer_step")
    before = [row for row in rows[:last] if row["row"] == "step"]
    up, down = (sum(row[f"wire_{way}_bytes"] for row in before) for way in ("up", "down"))
    joules = 45.0 * sum(row["wall_s"] for row in rows if row["row"] == "optimizer_step")
    bill = Prices().bill(
        wire_bytes=up + down, cloud_flops=sum(row["cloud_flops"] for row in before), edge_joules=joules
    )
    assert up > 0
    assert (costs["costs/up_bytes"], costs["costs/down_bytes"]) == (up, down)
    assert costs["costs/edge_joules"] == pytest.approx(joules)
    assert costs["costs/USD"] == pytest.approx(bill.total)


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path: Path) -> None:
    """Killed in step 4, it goes on from step 2; no step is shown twice, and costs count what was redone."""
    recipe = _recipe(tmp_path)

    def crash(drained: int) -> None:
        if drained == 6:  # two evaluations and four steps
            raise CrashError

    with pytest.raises(CrashError):
        train_tiny(recipe, crash)
    folder = train_tiny(recipe, resume=True).folder
    scalars = _scalars(folder)
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]
    crossed = [row for row in read_ledger(folder.ledger) if row["row"] == "step"]
    after_last_step = 2 * 100  # the last evaluation's
    assert scalars["costs/up_bytes"][-1][1] == sum(row["wire_up_bytes"] for row in crossed) - after_last_step


def test_tracking_changes_no_number(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    tracked = train_tiny(_recipe(tmp_path)).folder
    plain = train_tiny(
        tiny_recipe(tmp_path / "plain", data={"eval_fraction": 0.2}, train={**TRACKED, "report_to": []})
    ).folder
    name = "adapter_model.safetensors"
    assert (tracked.adapter / name).read_bytes() == (plain.adapter / name).read_bytes()
    assert not (plain.path / "tensorboard").exists()


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed here")
def test_a_missing_tracker_is_one_clear_line_before_anything_starts(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"report_to": ["tensorboard", "mlflow"]})

    def never(recipe: Recipe) -> LoadedModel:
        pytest.fail("the model was fetched for nothing")

    with pytest.raises(RecipeError, match=r"names mlflow, whose package is not installed") as caught:
        train_recipe(recipe, load=never, console=quiet()[0])
    assert "pip install mlflow" in caught.value.cure
    assert not recipe.run_folder.exists()


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.report_to"):
        tiny_recipe(tmp_path, train={"report_to": ["excel"]})


def test_a_run_may_be_resumed_with_another_tracker(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": 2})
    tracked = tiny_recipe(tmp_path, train={"steps": 2, "report_to": ["tensorboard"]})
    assert recipe.numbers_sha256() == tracked.numbers_sha256()
