"""A bottom that freezes on the way: the top's optimizer goes on, samples cross once more, resume is exact."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.cached_runs import CrashError, cached_recipe, losses, train_over
from support.edge_runs import byte_tokenizer
from support.in_process import InProcessCloud
from support.local_runs import block_of, local_losses
from tightbeam.common.errors import BudgetError, RecipeError, TightbeamError
from tightbeam.edge.cache import inspect_cache
from tightbeam.edge.data import collate, load_examples, split_examples
from tightbeam.edge.modes.freeze import freeze_step
from tightbeam.edge.modes.settling import LOOKS_PER_EPOCH, Settling
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.checkpoints import latest
from tightbeam.edge.training.folder import RunFolder

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BLOCKS = (0, 1, 4, 5)  # of bottom and top at cut 2:2


def freezing(folder: Path, after: float | str | None, **changes: Any) -> Recipe:
    train = {"freeze_bottom_after": after, "checkpoint_every": 3} | changes.pop("train", {})
    return cached_recipe(folder, mode="ushape", train=train, **changes)


def adapter(run: RunFolder, step: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(
        run.checkpoints / f"step-{step}" / "adapter_model.safetensors"
    )
    return tensors


def test_it_trains_the_bottom_until_then_and_not_after(cloud: InProcessCloud, tmp_path: Path) -> None:
    train = {"checkpoint_every": 4, "keep_checkpoints": 9}
    result, crossing = train_over(cloud, freezing(tmp_path, "8 steps", train=train))
    early, at, late = (adapter(result.folder, step) for step in (4, 8, 24))
    for name in at:
        below = block_of(name) < 2
        assert not torch.equal(early[name], at[name]), name
        assert torch.equal(at[name], late[name]) == below, name
    kinds = [row.kind for row in crossing.rows]
    assert kinds == ["forward", "backward"] * 8 + ["forward"] * 8  # 8 steps, and each sample once more
    assert [header.keep for header, _ in crossing.messages][16:] == [False] * 8


def test_the_first_phase_is_plain_ushape_and_the_optimizer_goes_on(
    cloud: InProcessCloud, folder: Path, tmp_path: Path
) -> None:
    """Against a local loop that freezes at the same step and keeps its optimizer."""
    train = {"lr": 1e-3, "schedule": "constant", "max_grad_norm": 0}
    recipe = freezing(tmp_path, 0.5, train=train, adapter={"r": 2, "alpha": 4, "dropout": 0.0})
    result, _ = train_over(cloud, recipe)
    found = [float(loss) for loss in losses(result.folder)]
    freeze: Any = {"freeze_at": 4, "num_frozen": 2}
    assert found == pytest.approx(local_losses(recipe, folder, BLOCKS, **freeze), abs=1e-5)
    fresh = local_losses(recipe, folder, BLOCKS, **freeze, fresh_optimizer=True)
    assert found[:5] == pytest.approx(fresh[:5], abs=1e-5)
    assert found != pytest.approx(fresh, abs=1e-5)  # a new optimizer would have been noticed


@pytest.mark.parametrize("crash_after_rows", [6, 15, 18, 22])
def test_a_crash_in_either_phase_resumes_bit_for_bit(
    cloud: InProcessCloud, tmp_path: Path, crash_after_rows: int
) -> None:
    """Rows 1 to 16 are the steps of the first phase, 17 to 24 the one pass. Dropout is on."""
    whole, _ = train_over(cloud, freezing(tmp_path / "a", "8 steps"))

    def crash(rows: int) -> None:
        if rows == crash_after_rows:
            raise CrashError

    recipe = freezing(tmp_path / "b", "8 steps")
    with pytest.raises(CrashError):
        train_over(cloud, recipe, act=crash)
    resumed, _ = train_over(cloud, recipe, resume=True)
    assert losses(resumed.folder) == losses(whole.folder)
    left, right = adapter(resumed.folder, 24), adapter(whole.folder, 24)
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_resuming_in_the_second_phase_needs_no_cloud(
    cloud: InProcessCloud, tmp_path: Path, folder: Path
) -> None:
    recipe = freezing(tmp_path / "b", "8 steps", train={"keep_checkpoints": 9})
    whole, _ = train_over(cloud, recipe)
    before = losses(whole.folder)
    for step in (18, 21, 24):
        (whole.folder.checkpoints / f"step-{step}" / "manifest.json").unlink()
    warnings: list[str] = []
    assert latest(whole.folder.checkpoints, warnings.append) == whole.folder.checkpoints / "step-15"
    assert len(warnings) == 3
    resumed, crossing = train_over(cloud, recipe, resume=True)
    assert crossing.rows == []
    assert losses(resumed.folder) == before


def test_a_checkpoint_of_another_bottom_is_refused(cloud: InProcessCloud, tmp_path: Path) -> None:
    recipe = freezing(tmp_path, "3 steps")
    result, _ = train_over(cloud, recipe)
    path = result.folder.checkpoints / "step-24"
    state = json.loads((path / "state.json").read_text())
    assert state["position"]["mode"]["phase"] == "frozen"
    state["position"]["mode"]["bottom_sha256"] = "00" * 32
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TightbeamError, match="not the one that was frozen"):
        train_over(cloud, recipe, resume=True)


def test_the_evaluation_after_the_freeze_crosses_once(cloud: InProcessCloud, tmp_path: Path) -> None:
    recipe = freezing(tmp_path, "6 steps", data={"eval_fraction": 0.2}, train={"eval_every": 6})
    result, crossing = train_over(cloud, recipe)
    rows = read_ledger(result.folder.ledger)
    evals = [i for i, row in enumerate(rows) if row["row"] == "eval"]
    assert len(evals) == 4
    assert all(row["row"] != "step" for row in rows[evals[2] + 1 :])
    held = inspect_cache(result.folder.path / "cache").scopes
    assert [scope.num_entries for scope in held] == [23]
    assert len(crossing.rows) == 2 + 2 * 6 + 2 + 6 + 2


def test_the_adapter_opens_on_the_whole_model(cloud: InProcessCloud, folder: Path, tmp_path: Path) -> None:
    recipe = freezing(tmp_path, 1.0, adapter={"r": 2, "dropout": 0.0}, data={"eval_fraction": 0.2})
    result, _ = train_over(cloud, recipe)
    whole = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), result.folder.adapter
    )
    adapted = {block_of(name) for name, _ in whole.named_modules() if name.endswith("lora_A")}
    assert adapted == {0, 1, 4, 5}
    held = split_examples(load_examples(recipe.data.train, byte_tokenizer()), 0.2, 0)[1]
    with torch.no_grad():
        total = sum(float(whole(**collate([e], 0)).loss) * e.num_learned for e in held)
    assert result.last_eval_loss == pytest.approx(total / sum(e.num_learned for e in held), abs=1e-5)


def test_auto_freezes_within_its_bounds(cloud: InProcessCloud, tmp_path: Path) -> None:
    train = {"batch_size": 1, "epochs": 2, "lr": 1e-3}
    result, crossing = train_over(cloud, freezing(tmp_path, "auto", train=train))
    trained = sum(row.kind == "backward" for row in crossing.rows)
    assert 23 / 2 <= trained <= 23
    assert f"Step {trained}: the bottom is frozen (its activations have settled)" in crossing.said
    assert result.optimizer_steps == 46


# Looks of three seeds on the Jargon File: `benchmarks/freeze_rule.py --points never`.
LOOKS = (
    (0.136, 0.221, 0.225, 0.222, 0.254, 0.267, 0.252, 0.269, 0.263, 0.275),
    (0.129, 0.242, 0.223, 0.250, 0.242, 0.261, 0.275, 0.269, 0.269, 0.261),
    (0.138, 0.220, 0.211, 0.240, 0.251, 0.246, 0.271, 0.263, 0.273, 0.277),
)


def frozen_after(distances: Sequence[float]) -> int:
    """Looks until the rule freezes."""
    rule, looks = Settling(steps_per_epoch=LOOKS_PER_EPOCH), iter(distances)
    return next(n for n in range(1, 100) if rule.says_freeze(n, lambda: next(looks)))


def test_the_rule_waits_for_more_than_one_quiet_look() -> None:
    assert [frozen_after(looks) for looks in LOOKS] == [8, 5, 8]
    assert all(min(looks[2] / looks[1], looks[3] / looks[2]) < 1.02 for looks in LOOKS)  # quiet too early


def test_what_keeps_moving_is_frozen_after_an_epoch_and_what_stands_after_half() -> None:
    assert frozen_after([n**0.5 for n in range(1, 20)]) == LOOKS_PER_EPOCH
    assert frozen_after([float(n) for n in range(1, 20)]) == LOOKS_PER_EPOCH
    assert frozen_after([1.0] * 20) == LOOKS_PER_EPOCH / 2


def test_a_budget_brings_the_freeze_forward(cloud: InProcessCloud, tmp_path: Path) -> None:
    free, much = train_over(cloud, freezing(tmp_path / "a", "16 steps"))
    spent = sum(row.bytes.wire_total_bytes for row in much.rows)
    max_mb = 0.75 * spent / 1e6
    result, crossing = train_over(cloud, freezing(tmp_path / "b", "16 steps", train={"max_mb": max_mb}))
    assert result.optimizer_steps == free.optimizer_steps
    assert 0.3 * max_mb < sum(row.bytes.wire_total_bytes for row in crossing.rows) / 1e6 <= max_mb
    assert "train.max_mb is" in crossing.said
    assert 0 < sum(row.kind == "backward" for row in crossing.rows) < 16


def test_a_budget_stops_plain_ushape_with_a_checkpoint(cloud: InProcessCloud, tmp_path: Path) -> None:
    recipe = freezing(tmp_path, None, train={"max_mb": 0.25})
    with pytest.raises(BudgetError, match=r"freeze_bottom_after: auto"):
        train_over(cloud, recipe)
    folder = RunFolder(recipe.run_folder)
    done = len(losses(folder))
    assert done > 1
    assert latest(folder.checkpoints, pytest.fail) == folder.checkpoints / f"step-{done}"
    moved = [row for row in read_ledger(folder.ledger) if row["row"] == "step"]
    assert sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in moved) <= 0.25e6
    with pytest.raises(BudgetError):  # what earlier processes moved counts
        train_over(cloud, recipe, resume=True)


def test_a_budget_below_one_pass_is_refused_at_once(cloud: InProcessCloud, tmp_path: Path) -> None:
    recipe = freezing(tmp_path, "auto", train={"max_mb": 0.01})
    with pytest.raises(BudgetError, match="One pass over the data"):
        train_over(cloud, recipe)


@pytest.mark.parametrize(
    ("value", "step"), [(0.5, 50), (2, 200), (0.001, 1), ("7 steps", 7), ("1 step", 1), ("auto", None)]
)
def test_when_the_recipe_says(value: float | str, step: int | None) -> None:
    assert freeze_step(value, 100) == step


def test_only_ushape_freezes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is for mode ushape"):
        cached_recipe(tmp_path, train={"freeze_bottom_after": 1.0})
