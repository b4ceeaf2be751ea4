"""Reads a run folder into typed rows: the only place that knows how the edge's ledger spells them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tightbeam.common.accounts.prices import PriceList
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.errors import DataError, reason
from tightbeam.edge.report.meter import read_ledger

__all__ = ["EvalRow", "OptimizerRow", "RunRecords", "RunRow", "TransferRow", "read_run"]

_CURE = "Give a run folder that `tightbeam train` has written."


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    time_unix_s: float = 0.0


class RunRow(_Row):
    """One start of a training process."""

    run: str
    model: str
    fingerprint: str
    cut: str
    codec: str | dict[str, str]
    dtype: str
    mode: str
    hidden_size: int | None = None
    num_blocks: int | None = None
    num_taps: int = 0
    tap_size: int | None = None  # elements; unknown in ledgers of mode side without it
    prices: PriceList | None = None  # as the cloud's identity signed them; None where it named none
    cloud_device: str = ""  # kind: "cpu", "cuda"
    weight_bytes: int | None = None  # of the blocks of this cut, as the cloud sends them
    model_bytes: int | None = None  # of all blocks

    def codecs(self) -> dict[str, str]:
        """Codec by tensor: activations and gradients, up and down; "auto" by what it stands for."""
        names = ("activations_up", "activations_down", "gradients_up", "gradients_down")
        codecs = dict.fromkeys(names, self.codec) if isinstance(self.codec, str) else self.codec
        lossless = "bf16" if self.dtype == "bfloat16" else "fp32"
        return {name: lossless if codec == "auto" else codec for name, codec in codecs.items()}


class OptimizerRow(_Row):
    """One optimizer step of the training loop."""

    n: int
    loss: float
    tokens: int
    wall_s: float
    edge_compute_s: float
    edge_flops: int
    peak_memory_bytes: int


class EvalRow(_Row):
    """One evaluation, after optimizer step `n`."""

    n: int
    loss: float
    tokens: int


class TransferRow(_Row):
    """A transfer besides the steps, such as a download of weights."""

    kind: str
    name: str
    run: str = ""  # the start that it belongs to
    wire_up_bytes: int
    wire_down_bytes: int
    seconds: float


@dataclass
class RunRecords:
    """Everything one run folder says about what it cost."""

    name: str
    config: dict[str, Any]
    env: dict[str, Any]
    runs: list[RunRow] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    waited_by_evals: list[StepRow] = field(default_factory=list)
    """Those of `steps` that an evaluation waited for."""
    optimizer_steps: list[OptimizerRow] = field(default_factory=list)
    evals: list[EvalRow] = field(default_factory=list)
    transfers: list[TransferRow] = field(default_factory=list)


def read_run(folder: str | Path) -> RunRecords:
    """Read `config.yaml`, `env.json` and `ledger.jsonl` of a run folder.

    Raises:
        DataError: the folder is no run folder, a row is wrong, or nothing has crossed yet.

    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no run folder {folder}.", cure=_CURE)
    if not (folder / "config.yaml").exists():
        inside = ", ".join(str(path.parent) for path in sorted(folder.glob("*/config.yaml")))
        cure = f"Give the ones in it: {inside}." if inside else _CURE
        raise DataError(f"{folder} is no run folder: it has no config.yaml.", cure=cure)
    records = RunRecords(folder.resolve().name, _config(folder / "config.yaml"), _env(folder / "env.json"))
    path = folder / "ledger.jsonl"
    settled = 0  # steps whose row came before the last row that stands for work of the edge
    for number, row in enumerate(read_ledger(path), 1):
        try:
            _file(records, row)
            if row["row"] == "eval":
                records.waited_by_evals += records.steps[settled:]
            if row["row"] not in ("step", "sent"):
                settled = len(records.steps)
        except (TypeError, ValidationError) as error:
            raise DataError(
                f"{path}:{number} is not a row of this version: {error}.",
                cure="Read it with the version that wrote it; env.json names that.",
            ) from error
    if not records.runs or not (records.steps or records.optimizer_steps):
        raise DataError(
            f"{path} has no step in it yet, so there is nothing to report.",
            cure="Let the run train at least one step.",
        )
    return records


def _file(records: RunRecords, row: dict[str, Any]) -> None:
    match row["row"]:
        case "step":
            records.steps.append(StepRow.from_json(row))
        case "optimizer_step":
            records.optimizer_steps.append(OptimizerRow.model_validate(row))
        case "eval":
            records.evals.append(EvalRow.model_validate(row))
        case "transfer":
            run = records.runs[-1].run if records.runs else ""
            records.transfers.append(TransferRow.model_validate({"run": run, **row}))
        case "run":
            records.runs.append(RunRow.model_validate(row))
        case "sent":
            pass  # its step row follows, or the process was killed
        case other:
            raise TypeError(f"unknown kind {other!r}")


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"Cannot read {path}: {reason(error)}.", cure=_CURE) from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a recipe.", cure=_CURE)
    return config


def _env(path: Path) -> dict[str, Any]:
    """Versions and device; a run killed while starting has none, and its costs can still be told."""
    if not path.exists():
        return {}
    try:
        env = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {reason(error)}.", cure=_CURE) from error
    return env if isinstance(env, dict) else {}
