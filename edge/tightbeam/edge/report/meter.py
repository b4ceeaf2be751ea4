"""Stopwatches, peak memory and the edge's ledger file: how a step row comes to be and where it is kept.

The same names on both sides. Waiting for a reply is split afterwards: the cloud says how long the step queued
and computed, and what remains of the wait is `network`.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil

from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.common.errors import DataError

__all__ = ["JsonlLedger", "Phase", "StepMeter", "peak_memory_bytes", "read_ledger"]

_log = logging.getLogger(__name__)

Phase = Literal["codec", "seal", "network", "queue", "compute"]


class StepMeter:
    """Seconds of one step by phase. Measured phases must not nest: each second is counted once."""

    def __init__(self) -> None:
        self._seconds: dict[Phase, float] = dict.fromkeys(
            ("codec", "seal", "network", "queue", "compute"), 0.0
        )
        self._running = False

    @contextlib.contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Add the wall time of the block to `phase`, also when it raises."""
        assert not self._running, "phases must not nest"
        self._running = True
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start
            self._running = False

    def seconds(self, phase: Phase) -> float:
        """Seconds of `phase` so far."""
        return self._seconds[phase]

    def cloud_spent(self, queue_s: float, compute_s: float) -> None:
        """Take the cloud's own figures out of the wait for its reply; what remains is the network's."""
        self._seconds["queue"] += queue_s
        self._seconds["compute"] += compute_s
        # The clocks differ, and a coalesced reply may have been waited for less than it took to compute.
        self._seconds["network"] = max(0.0, self._seconds["network"] - queue_s - compute_s)

    def row(
        self,
        *,
        run: str,
        step: int,
        kind: str,
        tokens: int,
        segments: int,
        bytes: StepBytes,  # noqa: A002  # the row's own field name
        cloud_flops: int,
        resent_bytes: int = 0,
        attempts: int = 1,
    ) -> StepRow:
        """Make the row of this step, stamped now."""
        return StepRow(
            run=run,
            step=step,
            kind=kind,
            tokens=tokens,
            segments=segments,
            bytes=bytes,
            cloud_flops=cloud_flops,
            codec_s=self._seconds["codec"],
            seal_s=self._seconds["seal"],
            network_s=self._seconds["network"],
            cloud_queue_s=self._seconds["queue"],
            cloud_compute_s=self._seconds["compute"],
            resent_bytes=resent_bytes,
            attempts=attempts,
            time_unix_s=time.time(),
        )


def peak_memory_bytes(device: object = "cpu") -> int:
    """Most memory that this process has held: on CUDA what torch allocated there, else resident memory."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(str(device)))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    # Linux hands ru_maxrss of the starting process down to a child, so VmHWM is asked first there.
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class JsonlLedger:
    """The edge's append-only ledger, one JSON object a line, handed to the system line by line.

    A line that a kill tore is taken out when the file is opened again, so that only ever the last line can be
    incomplete.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        _drop_torn_tail(self._path)
        self._file = self._path.open("a", encoding="utf-8", newline="\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; its "row" key says what it is."""
        assert isinstance(row.get("row"), str), "a ledger row names its kind"
        self._file.write(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; rows are in it already."""
        self._file.close()


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """Read all rows of an edge's ledger; a torn last line is left out and logged.

    Raises:
        DataError: the file is missing, or a line before the last one is not a row; the message names it.

    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"Cannot read the ledger {path}: {error.strerror}.",
            cure="Give a run folder that `tightbeam train` has written.",
        ) from error
    torn = lines.pop()  # empty when the last line is complete
    if torn:
        _log.warning("%s: the last line is incomplete (a process was killed); left out.", path)
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("row"), str):
        raise DataError(
            f"{path}:{number} is not a ledger row.",
            cure="Restore the file; ledgers are never edited by hand.",
        )
    return row


def _drop_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        whole = file.read()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            _log.warning("%s: took out an incomplete last line.", path)
            file.truncate(end)
