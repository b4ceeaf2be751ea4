"""`tightbeam compare`: the same task in each mode against a real cloud process, and what it refuses."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.cached_runs import save_model
from support.commands import Cloud
from support.edge_runs import quiet, tiny_llama, tiny_recipe
from tightbeam.cli.compare import compare as command
from tightbeam.common.errors import FingerprintError, RecipeError, UsageError
from tightbeam.edge.comparison.compare import compare, comparison_folder, recipe_of
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.comparison import (
    ModeResult,
    lines_of,
    print_comparison,
    to_html,
    write_comparison,
)

RESULT = ModeResult(
    mode="ushape", model="tiny", cut="2:2", eval_loss_before=5.5, eval_loss_after=None, wire_up_bytes=2_000,
    wire_down_bytes=3_000_000, edge_flops=10**9, cloud_flops=0, seconds=61.0, peak_memory_bytes=10**8,
    seen_tokens=1234, seen_gradients=7,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    folder = tmp_path_factory.mktemp("cloud")
    (folder / "public.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    fit = ("--projection-text", str(folder / "public.txt"), "--projection", str(folder / "p.safetensors"))
    with Cloud(model, folder, *fit) as process:
        yield process


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "weights"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


MODES = ("local", "ushape", "freeze", "top", "side")


def _recipe(folder: Path, address: str = "127.0.0.1:1", local: Path | None = None) -> Recipe:
    section = {"cloud": address, "insecure": True, "local_path": None if local is None else str(local)}
    return tiny_recipe(
        folder,
        cut="2:2",
        model=section,
        data={"eval_fraction": 0.2},
        side={"taps": 1, "width": 16, "heads": 2},
        train={"steps": None, "epochs": 2, "checkpoint_every": 0},
    )


def test_modes_side_by_side(
    cloud: Cloud, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tmp_path, cloud.address, model)
    (tmp_path / "recipe.yaml").write_text(recipe.resolved_yaml())
    command(tmp_path / "recipe.yaml", modes="local, ushape,freeze,top,side")
    folder = comparison_folder(recipe)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "compare.html")
    found: dict[str, dict[str, Any]] = {
        row["mode"]: row for row in json.loads((folder / "compare.json").read_text())
    }
    assert list(found) == list(MODES)
    local, ushape, _, top, side = found.values()
    # The same blocks, seed and data: split or whole is the same training.
    assert local["eval_loss_after"] == pytest.approx(ushape["eval_loss_after"], rel=1e-4)
    assert local["eval_loss_after"] < local["eval_loss_before"]
    # Other blocks or fewer steps: another result. Without this the line above could not fail.
    assert top["eval_loss_after"] != pytest.approx(ushape["eval_loss_after"], rel=1e-4)
    moved = [row["wire_up_bytes"] + row["wire_down_bytes"] for row in found.values()]
    assert moved[0] == 0 < moved[3] < moved[2] < moved[1]
    assert side["wire_up_bytes"] == pytest.approx(top["wire_up_bytes"], rel=0.1)
    assert moved[3] < moved[4] < moved[1]  # taps come down with the answer
    assert local["cloud_flops"] == 0 < top["cloud_flops"] < ushape["cloud_flops"]
    assert local["edge_flops"] > ushape["edge_flops"] > top["edge_flops"] > 0
    assert [row["seen_gradients"] > 0 for row in found.values()] == [False, True, True, False, False]
    assert local["cloud_saw"] == "nothing of the data"
    assert all(row["seconds"] > 0 and row["peak_memory_bytes"] > 0 for row in found.values())
    assert (folder / "top" / "adapter" / "adapter_model.safetensors").exists()
    assert "gradients at the cut" in (folder / "compare.html").read_text()
    with pytest.raises(RecipeError, match="is there already"):
        compare(recipe, ["top"])


def test_another_backbone_here_is_named_with_its_mode(cloud: Cloud, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_llama(seed=1, num_hidden_layers=6).save_pretrained(other)
    with pytest.raises(FingerprintError, match=r"Mode local: .* is not the backbone"):
        compare(_recipe(tmp_path, cloud.address, other), ["local"])


def test_local_needs_the_whole_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.local_path is not set.*--set model.local_path"):
        compare(_recipe(tmp_path), ["ushape", "local"])
    with pytest.raises(RecipeError, match=r"model.local_path is .*gone"):
        compare(_recipe(tmp_path, local=tmp_path / "gone"), ["local"])
    assert not comparison_folder(_recipe(tmp_path)).exists()  # told before the first mode has trained


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (["usahpe"], "Did you mean ushape"),
        (["top", "top"], "once"),
        ([], "once"),
        (["fast"], "Known are ushape, freeze, top, side, local"),
    ],
)
def test_modes_are_checked_first(tmp_path: Path, modes: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(_recipe(tmp_path), modes)


def test_a_mode_changes_only_what_it_is(tmp_path: Path) -> None:
    base = _recipe(tmp_path, local=tmp_path)
    recipes = {mode: recipe_of(base, mode) for mode in MODES}
    assert [recipe.mode for recipe in recipes.values()] == ["ushape", "ushape", "ushape", "top", "side"]
    assert [recipe.train.freeze_bottom_after for recipe in recipes.values()] == [None, None, 0.5, None, None]
    for mode, recipe in recipes.items():
        assert recipe.run_folder == base.output.dir / "run-compare" / mode
        assert (recipe.data, recipe.adapter, recipe.codec) == (base.data, base.adapter, base.codec)
        assert recipe.train.model_copy(update={"freeze_bottom_after": None}) == base.train
    auto = base.model_copy(update={"train": base.train.model_copy(update={"freeze_bottom_after": "auto"})})
    assert recipe_of(auto, "freeze").train.freeze_bottom_after == "auto"


def test_table_and_page_hold_every_figure(tmp_path: Path) -> None:
    console, text = quiet()
    print_comparison([RESULT], console)
    page = write_comparison([RESULT], tmp_path).read_text()
    for values in lines_of([RESULT]).values():
        assert values[0] in text.getvalue()
        assert f"<td>{values[0]}</td>" in page
    assert "gradients at the cut in 7 steps" in text.getvalue()
    assert RESULT.cloud_saw in page
    assert json.loads((tmp_path / "compare.json").read_text())[0]["eval_loss_after"] is None


def test_the_page_escapes_what_a_cloud_calls_its_model() -> None:
    assert "<script>" not in to_html([replace(RESULT, model="<script>")])
