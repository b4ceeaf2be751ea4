"""The run folder: who may write into it, and writes that are whole or not at all."""

import json
import os
import sys
from pathlib import Path

import pytest

from support.small_files import largest_file
from tightbeam.common.errors import RecipeError, TightbeamError, UsageError
from tightbeam.common.files import atomic_write, write_failed
from tightbeam.edge.recipe import Recipe, recipe_from_mapping
from tightbeam.edge.training.folder import MetricsFile, RunFolder


def _recipe(folder: Path, **train: object) -> Recipe:
    return recipe_from_mapping(
        {
            "model": {"cloud": "localhost:1"},
            "cut": "1:1",
            "data": {"train": "a.jsonl"},
            "train": {"steps": 3, **train},
            "output": {"dir": str(folder), "name": "a"},
        }
    )


def test_atomic_write_leaves_the_mode_that_other_files_have(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    atomic_write(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")
    with (
        largest_file(100),
        pytest.raises(TightbeamError, match=r"No space left to write .*a\.txt.*--resume"),
    ):
        atomic_write(path, "n" * 1000)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
    atomic_write(path, "n" * 1000)
    assert path.stat().st_size == 1000


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(TightbeamError, match=r"Cannot write .*file.*b\.txt.*permissions"):
        atomic_write(tmp_path / "file" / "b.txt", "x")


def test_only_a_full_disk_is_called_one(tmp_path: Path) -> None:
    assert "No space left" in str(write_failed(tmp_path, OSError(28, "No space left on device")))
    assert "No space left" not in str(write_failed(tmp_path, PermissionError(13, "Permission denied")))


def test_opening_writes_nothing_and_claiming_does(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    folder = RunFolder.open(recipe)
    assert not folder.path.exists()
    folder.claim(recipe)
    assert folder.config.read_text(encoding="utf-8") == recipe.resolved_yaml()


def test_a_claimed_folder_takes_the_same_run_only(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    RunFolder.open(recipe).claim(recipe)
    with pytest.raises(RecipeError, match=r"already holds a run.*--resume.*output\.name"):
        RunFolder.open(recipe)
    assert RunFolder.open(recipe, resume=True).path == tmp_path / "a"
    assert RunFolder.open(_recipe(tmp_path, checkpoint_every=9), resume=True).path == tmp_path / "a"
    with pytest.raises(
        RecipeError, match=r"another recipe: train\.lr was 0\.0002 and is now 0\.1; train\.seed was 0"
    ):
        RunFolder.open(_recipe(tmp_path, lr=0.1, seed=4), resume=True)


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run to resume"):
        RunFolder.open(_recipe(tmp_path), resume=True)


def test_env_tells_versions_platform_and_facts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    folder.write_env(device="cpu")
    env = json.loads(folder.env.read_text(encoding="utf-8"))
    assert env["device"] == "cpu"
    assert env["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "peft"} <= env["packages"].keys()


def test_names_in_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    paths = [
        folder.config,
        folder.env,
        folder.ledger,
        folder.metrics,
        folder.adapter,
        folder.checkpoints,
        folder.report,
    ]
    assert [path.name for path in paths] == [
        "config.yaml", "env.json", "ledger.jsonl", "metrics.csv", "adapter", "checkpoints", "report.html",
    ]  # fmt: skip
    assert {path.parent for path in paths} == {tmp_path}


def test_metrics_are_one_row_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.append(optimizer_step=1, loss=2.5)
    metrics.append(optimizer_step=2, loss=2.0, eval_loss=3.0)
    header, first, second = path.read_text(encoding="utf-8").splitlines()
    assert header.startswith("optimizer_step,epoch,loss,eval_loss,lr")
    assert (first, second) == ("1,,2.5,,,,,,,", "2,,2.0,3.0,,,,,,")
    with pytest.raises(ValueError, match="los"):
        metrics.append(los=3)


def test_resumed_metrics_drop_what_is_done_again_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    for step in (1, 2, 3):
        metrics.append(optimizer_step=step, loss=step / 2)
    with path.open("a", encoding="utf-8") as file:
        file.write("4,0.")
    MetricsFile(path, after_step=2)
    assert [line.split(",")[0] for line in path.read_text(encoding="utf-8").splitlines()] == [
        "optimizer_step",
        "1",
        "2",
    ]


def test_a_full_disk_is_told_by_the_metrics_too(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    with (
        largest_file(os.path.getsize(tmp_path / "metrics.csv")),
        pytest.raises(TightbeamError, match=r"metrics\.csv"),
    ):
        metrics.append(optimizer_step=1)
