"""Checkpoints from which a run goes on bit for bit, and which a kill or a full disk cannot spoil.

    checkpoints/step-N/
        adapter_model.safetensors, adapter_config.json    the adapter, in PEFT's format
        side.safetensors                                  the ladder of mode side
        optimizer.safetensors                             AdamW's tensors, as <parameter number>/<name>
        rng.safetensors                                   random states of torch, per device
        state.json                                        position, schedule, other random states
        manifest.json                                     SHA-256 of every file above

A checkpoint is written to a hidden folder, synced, and renamed; no file of it is ever changed afterwards. No
pickle: a checkpoint from a stranger can be wrong, but it cannot run code.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tightbeam.common.errors import RecipeError, TightbeamError
from tightbeam.common.files import sync_folder, write_failed
from tightbeam.edge.side.ladder import side_parameters

__all__ = [
    "Position",
    "RandomState",
    "latest",
    "load_checkpoint",
    "safetensors_os_error",
    "save_checkpoint",
    "verify",
]

_MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is: all of it done, nothing half done."""

    optimizer_step: int = 0
    epoch: int = 0
    batch: int = 0  # micro-batches done of this epoch
    tokens: int = 0  # real tokens trained on, whole run
    wire_bytes: int = 0  # moved by steps, whole run
    mode: dict[str, Any] = field(default_factory=dict)  # what the mode must remember


@dataclass(frozen=True)
class RandomState:
    """Random states of Python, NumPy and torch at one moment."""

    plain: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def capture(cls) -> "RandomState":
        """Take the states as they are now."""
        numpy = np.random.get_state(legacy=False)
        assert isinstance(numpy, dict)
        numpy["state"] = {**numpy["state"], "key": numpy["state"]["key"].tolist()}
        plain = {"python": random.getstate(), "numpy": numpy}
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        if torch.backends.mps.is_available():
            tensors["mps"] = torch.mps.get_rng_state()
        return cls(plain, tensors)

    def restore(self) -> None:
        """Set the states again; those of devices that this machine lacks are passed over."""
        version, internal, gauss = self.plain["python"]
        random.setstate((version, tuple(internal), gauss))
        numpy = self.plain["numpy"]
        key = np.array(numpy["state"]["key"], dtype=np.uint32)
        np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
        for device, state in self.tensors.items():
            if device == "cpu":
                torch.set_rng_state(state)
            elif device.startswith("cuda") and int(device[5:]) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, device)
            elif device == "mps" and torch.backends.mps.is_available():
                torch.mps.set_rng_state(state)


def save_checkpoint(
    folder: Path,
    *,
    model: PeftModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    position: Position,
    random_state: RandomState,
    facts: Mapping[str, str],
    keep: int,
) -> Path:
    """Write `step-N`, and drop all but the newest `keep`.

    Raises:
        TightbeamError: it could not be written, a full disk for example; older checkpoints are intact.

    """
    final = folder / f"step-{position.optimizer_step}"
    if final.exists() and verify(final) is None:
        return final
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        _remove_leftovers(folder)
        temporary.mkdir(parents=True)
        _write_files(temporary, model, optimizer, scheduler, position, random_state, facts)
        if final.exists():
            shutil.rmtree(final)  # verify() found it broken
        os.replace(temporary, final)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise write_failed(final, safetensors_os_error(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder, keep)
    return final


def load_checkpoint(
    path: Path,
    *,
    model: PeftModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    facts: Mapping[str, str],
) -> Position:
    """Put a run back to where `path` was taken: adapter, optimizer, schedule and random states.

    Raises:
        RecipeError: the checkpoint was taken with other `facts`; the message names each.
        TightbeamError: its adapter is not the one the recipe describes.

    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    taken: dict[str, str] = state.get("facts", {})
    changed = [
        f"{name} was {taken.get(name)} and is now {fact}"
        for name, fact in facts.items()
        if taken.get(name) != fact
    ]
    if changed:
        raise RecipeError(
            f"{path} was taken with something else: {'; '.join(changed)}.",
            cure="Resume with what the run had, or start a new one under another output.name.",
        )
    adapter = _tensors(path / "adapter_model.safetensors")
    odd = adapter.keys() ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if odd:
        raise TightbeamError(
            f"{path} does not fit this adapter, first at {min(odd)}.", cure="Start a new run."
        )
    set_peft_model_state_dict(model, adapter)
    _load_side(path / "side.safetensors", model)
    optimizer.load_state_dict(
        _optimizer_state(state["param_groups"], _tensors(path / "optimizer.safetensors"))
    )
    scheduler.load_state_dict(state["scheduler"])
    RandomState(state["random"], _tensors(path / "rng.safetensors")).restore()
    return Position(**state["position"])


def latest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the newest whole checkpoint; broken ones on the way are named through `warn`."""
    for path in reversed(_steps(folder)):
        problem = verify(path)
        if problem is None:
            return path
        warn(f"Checkpoint {path} is damaged ({problem}); using the one before it.")
    return None


def verify(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None: every file must be there with its SHA-256."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"format {manifest['format']}, this version reads {_FORMAT}"
        for name, digest in manifest["files"].items():
            if _sha256(path / name) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _write_files(
    folder: Path,
    model: PeftModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    position: Position,
    random_state: RandomState,
    facts: Mapping[str, str],
) -> None:
    # Frozen embeddings need no saving, and PEFT's default would ask the model hub whether they changed.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    if side := side_parameters(model):
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in side.items()}, folder / "side.safetensors"
        )
    groups, tensors = _flat_optimizer(optimizer)
    save_file(tensors, folder / "optimizer.safetensors")
    save_file(random_state.tensors, folder / "rng.safetensors")
    state = {
        "facts": dict(facts),
        "position": asdict(position),
        "param_groups": groups,
        "scheduler": scheduler.state_dict(),
        "random": random_state.plain,
    }
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(
        json.dumps({"format": _FORMAT, "files": files}, indent=2), encoding="utf-8"
    )
    for path in folder.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


@torch.no_grad()
def _load_side(path: Path, model: PeftModel) -> None:
    parameters, saved = side_parameters(model), _tensors(path) if path.exists() else {}
    shapes = [{name: t.shape for name, t in part.items()} for part in (parameters, saved)]
    if shapes[0] != shapes[1]:
        raise TightbeamError(f"{path} does not fit this side network.", cure="Start a new run.")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _tensors(path: Path) -> dict[str, Tensor]:
    # Not load_file: it maps the file into memory, and Windows then refuses to remove the folder.
    tensors: dict[str, Tensor] = load(path.read_bytes())
    return tensors


def _flat_optimizer(optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    state = optimizer.state_dict()
    tensors = {
        f"{number}/{name}": value.detach().cpu().contiguous()
        for number, values in state["state"].items()
        for name, value in values.items()
    }
    return state["param_groups"], tensors


def _optimizer_state(groups: list[dict[str, Any]], tensors: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in groups]
    return {"state": state, "param_groups": groups}


def _steps(folder: Path) -> list[Path]:
    """Folders `step-N` by N; what is still being written has another name."""
    if not folder.is_dir():
        return []
    numbered = [
        (int(m[1]), path) for path in folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered)]


def _prune(folder: Path, keep: int) -> None:
    for path in _steps(folder)[:-keep]:
        # First out of sight, so that a kill in between leaves no half checkpoint under a good name.
        gone = path.with_name(f".{path.name}.old.tmp")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def safetensors_os_error(error: OSError | SafetensorError) -> OSError:
    """Read the error number that safetensors reports as text, `(os error N)`, when a write failed."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else 0, str(error))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
