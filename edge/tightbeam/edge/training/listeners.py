"""What a run keeps and shows of its events: ledger rows, metrics, progress lines, and a tally."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightbeam.common.accounts.rows import StepBytes
from tightbeam.common.files import write_failed
from tightbeam.edge.report.meter import JsonlLedger, peak_memory_bytes
from tightbeam.edge.training.events import (
    Evaluated,
    EvaluationStarted,
    Event,
    Froze,
    StepDone,
    StepStarted,
    Transferred,
)
from tightbeam.edge.training.folder import MetricsFile
from tightbeam.edge.training.progress import Notices, TrainingProgress

__all__ = ["LedgerRows", "MetricsRows", "ProgressLines", "Tally"]


class LedgerRows:
    """Rows of `ledger.jsonl`: all that crosses, every optimizer step and every evaluation."""

    def __init__(self, ledger: JsonlLedger, path: Path, device: str) -> None:
        self._ledger, self._path, self._device = ledger, path, device

    def __call__(self, event: Event) -> None:
        """Write the event's row, if it has one."""
        match event:
            case Transferred():
                self.append(event.row.to_json())
            case StepDone():
                self.write(
                    "optimizer_step",
                    n=event.step,
                    loss=event.loss,
                    tokens=event.tokens,
                    wall_s=event.wall_s,
                    edge_compute_s=event.edge_s,
                    edge_flops=event.edge_flops,
                    peak_memory_bytes=peak_memory_bytes(self._device),
                )
            case Evaluated():
                self.write("eval", n=event.step, loss=event.loss, tokens=event.tokens)

    def write(self, kind: str, **fields: Any) -> None:
        """Write a row stamped now."""
        self.append({"row": kind, **fields, "time_unix_s": time.time()})

    def append(self, row: dict[str, Any]) -> None:
        """Write a whole row; raises `TightbeamError` when the disk does not take it."""
        try:
            self._ledger.append(row)
        except OSError as error:
            raise write_failed(self._path, error) from error


class MetricsRows:
    """Rows of `metrics.csv`, one per optimizer step; bytes are those of training since the one before."""

    def __init__(self, file: MetricsFile) -> None:
        self._file, self._moved = file, StepBytes()
        self._row: dict[str, float] = {}  # of the last step, while it waits for its evaluation

    def __call__(self, event: Event) -> None:
        """Write the row of a step; one that an evaluation follows gets its loss too."""
        match event:
            case Transferred(evaluating=False):
                self._moved = self._moved + event.row.bytes
            case StepDone():
                moved, self._moved = self._moved, StepBytes()
                self._row = {
                    "optimizer_step": event.step,
                    "epoch": round(event.epoch, 4),
                    "loss": event.loss,
                    "lr": event.lr,
                    "grad_norm": event.grad_norm,
                    "tokens": event.tokens,
                    "wall_s": round(event.wall_s, 6),
                    "wire_up_bytes": moved.wire_up_bytes,
                    "wire_down_bytes": moved.wire_down_bytes,
                }
                if not event.evaluation_follows:
                    self._file.append(**self._row)
            case Evaluated() if self._row:  # none before the first step
                self._file.append(**self._row, eval_loss=event.loss)


class ProgressLines:
    """What a person sees; bytes are all that this process has moved."""

    def __init__(self, progress: TrainingProgress, notices: Notices) -> None:
        self._progress, self._notices, self._moved = progress, notices, StepBytes()

    def __call__(self, event: Event) -> None:
        """Show the event."""
        match event:
            case StepStarted():
                self._notices.at = f"step {event.step}/{event.total_steps}"
            case EvaluationStarted():
                self._notices.at = f"evaluation after step {event.step}"
            case Transferred():
                self._moved = self._moved + event.row.bytes
            case StepDone():
                up, down = self._moved.wire_up_bytes, self._moved.wire_down_bytes
                self._progress.step(
                    loss=event.loss,
                    tokens=event.tokens,
                    wall_s=event.wall_s,
                    up_bytes=up,
                    down_bytes=down,
                )
            case Evaluated():
                self._progress.say(f"evaluation after step {event.step}: loss {event.loss:.4f}")
            case Froze():
                self._progress.say(
                    f"Step {event.step}: the bottom is frozen ({event.reason}); "
                    "its activations cross once more."
                )


@dataclass(slots=True)
class Tally:
    """Sums of a run that checkpoints, budgets and the result need."""

    tokens: int = 0  # trained on, whole run
    wire_bytes: int = 0  # moved by steps, whole run
    eval_losses: list[float] = field(default_factory=list)  # of this process
    last_loss: float | None = None

    def __call__(self, event: Event) -> None:
        """Add the event."""
        match event:
            case Transferred():
                self.wire_bytes += event.row.bytes.wire_total_bytes
            case StepDone():
                self.last_loss, self.tokens = event.loss, self.tokens + event.tokens
            case Evaluated():
                self.eval_losses.append(event.loss)
