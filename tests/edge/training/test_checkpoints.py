"""Checkpoints survive what disks and kills do to them, and a damaged one is named, never used."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from support.edge_runs import tiny_llama, tiny_recipe, train_tiny
from support.small_files import largest_file
from tightbeam.common.errors import RecipeError, TightbeamError
from tightbeam.edge.model.adapters import attach_adapter
from tightbeam.edge.recipe import AdapterSection
from tightbeam.edge.training.checkpoints import (
    Position,
    RandomState,
    latest,
    load_checkpoint,
    save_checkpoint,
    verify,
)

State = tuple[PeftModel, Optimizer, LRScheduler]
FILES = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "manifest.json",
]


def _state(section: AdapterSection | None = None, seed: int = 0, num_steps: int = 2) -> State:
    """A model that has taken a few optimizer steps."""
    base = tiny_llama()
    torch.manual_seed(seed)
    model = attach_adapter(base, section or AdapterSection(r=2, dropout=0.1)).train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=10)
    for _ in range(num_steps):
        _train_step(model, optimizer, scheduler)
    return model, optimizer, scheduler


def _train_step(model: PeftModel, optimizer: Optimizer, scheduler: LRScheduler) -> float:
    ids = torch.randint(5, 200, (2, 8))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _save(folder: Path, state: State, step: int, keep: int = 2) -> Path:
    model, optimizer, scheduler = state
    return save_checkpoint(
        folder,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        position=Position(optimizer_step=step, epoch=1, batch=4, tokens=55),
        random_state=RandomState.capture(),
        facts={"recipe": "n"},
        keep=keep,
    )


def _load(path: Path, state: State, numbers: str = "n") -> Position:
    model, optimizer, scheduler = state
    return load_checkpoint(
        path, model=model, optimizer=optimizer, scheduler=scheduler, facts={"recipe": numbers}
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "section",
    [
        AdapterSection(r=2, dropout=0.3),
        AdapterSection(r=2, dropout=0.3, extra={"use_dora": True}),
        AdapterSection(method="ia3"),
        AdapterSection(method="loha", r=2),
        AdapterSection(method="lokr", r=2),
        AdapterSection(method="vera", r=4, dropout=0.2),
    ],
    ids=lambda section: section.method + ("+dora" if section.extra else ""),
)
def test_training_goes_on_bit_for_bit(tmp_path: Path, section: AdapterSection) -> None:
    state = _state(section)
    path = _save(tmp_path, state, 2)
    expected = [_train_step(*state) for _ in range(3)]

    other = _state(section, seed=9, num_steps=0)
    assert _load(path, other) == Position(optimizer_step=2, epoch=1, batch=4, tokens=55)
    assert [_train_step(*other) for _ in range(3)] == expected
    pairs = zip(state[0].parameters(), other[0].parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_random_states_of_python_numpy_and_torch_come_back(tmp_path: Path) -> None:
    state = _state()
    np.random.standard_normal()  # leaves a cached second draw, which is part of the state
    path = _save(tmp_path, state, 1)
    expected = [
        random.random(),
        float(np.random.standard_normal()),
        float(np.random.rand()),
        float(torch.rand(1)),
    ]
    _load(path, state)
    again = [
        random.random(),
        float(np.random.standard_normal()),
        float(np.random.rand()),
        float(torch.rand(1)),
    ]
    assert again == expected


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = _save(tmp_path, _state(), 1)
    assert sorted(FILES) == _names(path)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    state = _state()
    good, bad = _save(tmp_path, state, 1), _save(tmp_path, state, 2)
    raw = bytearray((bad / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (bad / name).write_bytes(raw)
    warnings: list[str] = []
    assert latest(tmp_path, warnings.append) == good
    assert len(warnings) == 1
    assert str(bad) in warnings[0]
    assert "using the one before it" in warnings[0]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path, _state(), 1)
    assert verify(path) is None
    (path / name).unlink()
    assert "FileNotFoundError" in str(verify(path))


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, _state(), 1)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}), encoding="utf-8")
    assert verify(path) == "format 2, this version reads 1"


def test_what_was_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    state = _state()
    good = _save(tmp_path, state, 1)
    (tmp_path / ".step-2.123.tmp").mkdir()
    assert latest(tmp_path, pytest.fail) == good
    _save(tmp_path, state, 3)
    assert _names(tmp_path) == ["step-1", "step-3"]


def test_without_any_checkpoint_there_is_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path / "none", pytest.fail) is None


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    state = _state()
    for step in (8, 9, 10, 11):
        _save(tmp_path, state, step, keep=2)
    assert _names(tmp_path) == ["step-10", "step-11"]


def test_a_good_checkpoint_is_not_written_twice_and_a_damaged_one_is(tmp_path: Path) -> None:
    state = _state()
    path = _save(tmp_path, state, 1)
    stamp = (path / "state.json").stat().st_mtime_ns
    _save(tmp_path, state, 1)
    assert (path / "state.json").stat().st_mtime_ns == stamp
    (path / "state.json").write_text("{}", encoding="utf-8")
    _save(tmp_path, state, 1)
    assert verify(path) is None


def test_another_recipe_or_another_adapter_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, _state(), 1)
    with pytest.raises(RecipeError, match="taken with something else: recipe was n and is now m"):
        _load(path, _state(), numbers="m")
    with pytest.raises(TightbeamError, match=r"does not fit this adapter, first at .*\.lora_"):
        _load(path, _state(AdapterSection(r=2, target_modules=["q_proj"])))


@pytest.mark.parametrize("num_bytes", [0, 1000, 6000])
def test_a_write_that_fails_leaves_the_last_good_one(tmp_path: Path, num_bytes: int) -> None:
    state = _state()
    good = _save(tmp_path, state, 1)
    with (
        largest_file(num_bytes),
        pytest.raises(TightbeamError, match=r"No space left to write .*step-2.*--resume"),
    ):
        _save(tmp_path, state, 2)
    assert _names(tmp_path) == ["step-1"]
    assert latest(tmp_path, pytest.fail) == good


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, where the system lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or subprocess.run(mount, capture_output=True).returncode != 0
    ):
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_stops_the_run_with_the_path_and_it_goes_on_after(
    small_disk: Path, tmp_path: Path
) -> None:
    whole = train_tiny(tiny_recipe(tmp_path, train={"steps": 12})).folder
    recipe = tiny_recipe(small_disk, train={"steps": 12})
    ballast = small_disk / "ballast"

    def fill(done: int) -> None:
        if done == 7:
            free = os.statvfs(small_disk)
            ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 16_384))

    with pytest.raises(TightbeamError, match=r"No space left to write .*step-10"):
        train_tiny(recipe, fill)
    checkpoints = recipe.run_folder / "checkpoints"
    assert latest(checkpoints, pytest.fail) == checkpoints / "step-5"
    ballast.unlink()
    result = train_tiny(recipe, resume=True)
    name = "adapter_model.safetensors"
    assert (result.folder.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
