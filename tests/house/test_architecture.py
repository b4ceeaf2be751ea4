"""docs/architecture.md tells the truth: every name on it exists, and a training step passes every stop."""

import importlib
import importlib.util
import os
import re
import sys
import threading
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from support.edge_runs import byte_tokenizer, quiet, tiny_llama, write_jsonl
from support.in_process import InProcessCloud
from tightbeam.edge.recipe import Recipe, recipe_from_mapping
from tightbeam.edge.training.run import run_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
_NAME = re.compile(r"`([\w/]+\.py):([\w.]+)`")
NAMES = sorted(set(_NAME.findall(PAGE)))


def resolve(file: str, name: str) -> object:
    """The object at `path/to/file.py:Qualified.name`; raises when there is none."""
    assert (ROOT / file).is_file()
    found: object = importlib.import_module(".".join(Path(file).with_suffix("").parts[1:]))
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_step", ROOT / "docs" / "images" / "draw_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_step"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("file", "name"), NAMES, ids=[name for _, name in NAMES])
def test_every_name_exists(file: str, name: str) -> None:
    resolve(file, name)


@pytest.mark.parametrize(
    ("file", "name", "error"),
    [
        ("cloud/tightbeam/cloud/engine.py", "Engine.forwards", AttributeError),
        ("cloud/tightbeam/cloud/engine.py", "Motor", AttributeError),
        ("cloud/tightbeam/cloud/motor.py", "Engine", AssertionError),
    ],
)
def test_a_wrong_name_is_found(file: str, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        resolve(file, name)


def test_everything_that_looks_like_a_name_is_read_as_one() -> None:
    assert len(_NAME.findall(PAGE)) == PAGE.count(".py:") > 25


def test_stops_are_numbered_through_and_stand_on_their_side() -> None:
    stops = [stop for section in _drawing().stops(PAGE) for stop in section]
    assert [stop.number for stop in stops] == list(range(1, len(stops) + 1))
    assert all(stop.file.startswith((f"{stop.side}/", "common/")) for stop in stops)


def test_the_picture_is_drawn_from_the_page() -> None:
    drawn = (ROOT / "docs" / "images" / "step.svg").read_text(encoding="utf-8")
    assert drawn == _drawing().draw(PAGE), "run: python docs/images/draw_step.py"
    assert drawn != _drawing().draw(PAGE.replace("Packer.pack`", "Packer.fold`"))


@pytest.fixture(scope="module")
def entered(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """What of the project one optimizer step calls, both sides, in order: `(file, qualified name)`."""
    calls: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(f"{ROOT}{os.sep}"):
            calls[Path(path).relative_to(ROOT).as_posix(), frame.f_code.co_qualname] = None

    folder = tmp_path_factory.mktemp("step")
    tiny_llama(num_hidden_layers=6).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    before, before_threads = sys.getprofile(), threading.getprofile()
    threading.setprofile(note)  # for threads that start from now on: the cloud's and the channel's
    try:
        with InProcessCloud(folder / "model", folder / "cloud") as cloud:
            recipe = _one_step(folder, cloud.listen())
            calls.clear()
            sys.setprofile(note)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TIGHTBEAM_CACHE", str(folder / "cache"))
                run_recipe(recipe, console=quiet()[0])
    finally:
        sys.setprofile(before)
        threading.setprofile(before_threads)
    return list(calls)


def _one_step(folder: Path, address: str) -> Recipe:
    data = write_jsonl(folder / "a.jsonl", [{"prompt": "1 + 1 =", "completion": "2"}])
    return recipe_from_mapping(
        {
            "model": {"cloud": address, "insecure": True},
            "cut": "1:1",
            "adapter": {"r": 2},
            "data": {"train": str(data)},
            "train": {"steps": 1, "batch_size": 1},
            "output": {"dir": str(folder), "name": "step", "report": False},
        }
    )


def test_a_training_step_passes_every_stop(entered: list[tuple[str, str]]) -> None:
    stops = [(stop.file, stop.name) for section in _drawing().stops(PAGE) for stop in section]
    assert [stop for stop in stops if stop not in entered] == []
    assert ("edge/tightbeam/edge/link/stepper.py", "Stepper.submit") not in entered  # lists can lack


def test_the_edge_passes_its_stops_in_the_order_of_the_page(entered: list[tuple[str, str]]) -> None:
    forward = [stop for stop in _drawing().stops(PAGE)[0] if stop.side == "edge"]
    sent = [(stop.file, stop.name) for stop in forward[:7]]
    assert sorted(sent, key=entered.index) == sent
