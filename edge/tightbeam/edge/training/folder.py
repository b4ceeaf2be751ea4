"""The run folder: everything one training run reads back or leaves behind.

    runs/<name>/
        config.yaml     the resolved recipe          env.json      versions, platform, device
        ledger.jsonl    what every step cost         metrics.csv   loss, rate, bytes per optimizer step
        checkpoints/    step-N/, to resume from      adapter/      the result, in PEFT's format
        report.html     the report                   lock          which process is at work in it

A folder belongs to one run. Starting again in it needs `resume`, and a recipe whose numbers are the same.
Files are written beside their place and then moved there, so that a kill or a full disk leaves the old one.
"""

import contextlib
import csv
import io
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from tightbeam.common.errors import RecipeError, UsageError
from tightbeam.common.files import atomic_write, write_failed
from tightbeam.common.locks import FolderLock
from tightbeam.edge.recipe import Recipe, load_recipe

__all__ = ["MetricsFile", "RunFolder", "environment"]

_PACKAGES = ("tightbeam", "torch", "transformers", "peft", "grpcio", "cryptography", "safetensors", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Where the files of one run are."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def env(self) -> Path:
        """Versions, platform and device."""
        return self.path / "env.json"

    @property
    def ledger(self) -> Path:
        """One JSON row per step, optimizer step and evaluation."""
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        """One CSV row per optimizer step."""
        return self.path / "metrics.csv"

    @property
    def adapter(self) -> Path:
        """The trained adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Folders `step-N`."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.path / "report.html"

    @classmethod
    def open(cls, recipe: Recipe, *, resume: bool = False) -> Self:
        """Check that the recipe's folder is free for a new run, or that its run may go on. Writes nothing.

        Raises:
            RecipeError: the folder holds a run and `resume` is off, or that run had other numbers.
            UsageError: `resume` is on and there is no run.

        """
        folder = cls(recipe.run_folder)
        if folder.config.exists():
            folder._check_same_run(recipe, resume)
        elif resume:
            raise UsageError(
                f"{folder.path} holds no run to resume.",
                cure="Leave --resume out to start one, or check output.name.",
            )
        return folder

    def lock(self, warn: Callable[[str], None]) -> FolderLock:
        """Keep every other process out of the folder; raises `UsageError` while one is in it."""
        cure = "Wait until it ends or stop it, or give this run another output.name."
        try:
            return FolderLock(self.path, what=f"The run folder {self.path}", cure=cure, warn=warn)
        except OSError as error:
            raise write_failed(self.path, error) from error

    def claim(self, recipe: Recipe) -> None:
        """Write config.yaml: from now on the folder holds this recipe's run."""
        atomic_write(self.config, recipe.resolved_yaml())

    def disclaim(self, *, keep_ledger: bool) -> None:
        """Take the claim back after a start that trained nothing; accounts of what crossed may stay."""
        for path in (self.config, self.env, self.metrics, *(() if keep_ledger else (self.ledger,))):
            path.unlink(missing_ok=True)

    def _check_same_run(self, recipe: Recipe, resume: bool) -> None:
        if not resume:
            raise RecipeError(
                f"{self.path} already holds a run.",
                cure="Add --resume to go on with it, or give this run another output.name.",
            )
        changed = _differences(load_recipe(self.config).numbers(), recipe.numbers())
        if changed:
            raise RecipeError(
                f"{self.path} was started with another recipe: {'; '.join(changed)}.",
                cure="Resume with the same values, or give the new run another output.name.",
            )

    def write_env(self, **facts: str) -> None:
        """Write env.json: installed versions, the platform, and `facts` such as the device."""
        atomic_write(self.env, json.dumps({**environment(), **facts}, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions and platform of this process."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} was {before!r} and is now {after!r}")
    return found


class MetricsFile:
    """metrics.csv, one row per optimizer step, in the hands of the training loop."""

    COLUMNS = (
        "optimizer_step", "epoch", "loss", "eval_loss", "lr", "grad_norm", "tokens", "wall_s",
        "wire_up_bytes", "wire_down_bytes",
    )  # fmt: skip

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        """Open the file; rows after `after_step`, which a resumed run will do again, are taken out."""
        self._path = path
        kept = [row for row in self._rows() if int(row["optimizer_step"]) <= after_step]
        atomic_write(path, self._csv(kept, header=True))

    def append(self, **row: float | str) -> None:
        """Add the row of one optimizer step; unknown columns are a `ValueError`."""
        try:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._csv([row], header=False))
        except OSError as error:
            raise write_failed(self._path, error) from error

    def _rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        rows = csv.DictReader(io.StringIO(self._path.read_text(encoding="utf-8"), newline=""))
        return [row for row in rows if None not in row.values()]  # a kill may have torn the last line

    def _csv(self, rows: list[dict[str, Any]], *, header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.COLUMNS, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
