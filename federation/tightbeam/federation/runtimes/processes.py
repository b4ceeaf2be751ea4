"""Processes that end with the one that started them, whatever ends it.

Each child runs in its own session (on Windows: process group), so that Ctrl-C reaches the parent only and the
parent decides: it asks every child to end, waits, and kills what is left. What children have started ends
too, even if it was detached or its parent was killed: it carries a mark in its environment. Output goes to
one log file per child, which stays.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

from tightbeam.common.errors import TightbeamError
from tightbeam.federation.runtimes.orphans import end, marked

__all__ = ["Child", "Children", "signals_as_exit"]

_POLL_S = 0.1
_NUM_LOG_LINES = 8
_OWN_SESSION: Mapping[str, Any] = {
    "start_new_session": True,  # Windows ignores it and reads the flag
    "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
}


@dataclass(frozen=True)
class Child:
    """One process; `answer` has its stdout, `log` its stderr."""

    name: str
    process: subprocess.Popen[bytes]
    answer: Path
    log: Path

    def require_alive_or_done(self) -> bool:
        """Return whether it has ended well; raises TightbeamError with its last words if it failed."""
        code = self.process.poll()
        if code:
            raise TightbeamError(
                f"{self.name} ended with code {code}: {self.last_words()}", cure=f"See {self.log}."
            )
        return code == 0

    def last_words(self) -> str:
        """Return the end of its log: from the line that says error on, if there is one."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_NUM_LOG_LINES:]
        errors = [line for line in lines if line.startswith("error:")]
        return (errors[-1] if errors else " / ".join(lines[-2:])) or "it said nothing."

    def first_answer(self, within_s: float) -> str:
        """Wait for the first line of its stdout; raises TightbeamError when it fails or takes too long."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            line, newline, _ = self.answer.read_text(encoding="utf-8").partition("\n")
            if newline:
                return line
            if self.require_alive_or_done():
                break
            time.sleep(_POLL_S)
        raise TightbeamError(f"{self.name} was not ready within {within_s:.0f} s.", cure=f"See {self.log}.")


@dataclass
class Children:
    """Context that starts processes, stops all on its way out, and names the logs after a failure."""

    logs: Path
    grace_s: float = 10.0
    started: list[Child] = field(default_factory=list)
    mark: str = field(default_factory=lambda: f"TIGHTBEAM_CHILD_{uuid.uuid4().hex}")
    _reaper: subprocess.Popen[bytes] | None = None  # ends all of them if this process is killed

    def start(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Child:
        """Start a process with `env` added to this one's environment."""
        if self._reaper is None:
            self._reaper = _start_reaper(self.mark)
        self.logs.mkdir(parents=True, exist_ok=True)
        answer, log = self.logs / f"{name}.out", self.logs / f"{name}.log"
        with answer.open("wb") as out, log.open("wb") as err:
            process = subprocess.Popen(  # noqa: S603 - our own command line
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env={**os.environ, **(env or {}), self.mark: "1"},
                **_OWN_SESSION,
            )
        child = Child(name, process, answer, log)
        self.started.append(child)
        return child

    def wait(self, children: Sequence[Child], within_s: float) -> Iterator[None]:
        """Yield about ten times a second until all have ended well; raises TightbeamError when one fails."""
        deadline = time.monotonic() + within_s
        while running := [child for child in children if not child.require_alive_or_done()]:
            if time.monotonic() > deadline:
                names = " and ".join(child.name for child in running)
                raise TightbeamError(f"{names} took longer than {within_s:.0f} s.", cure=f"See {self.logs}.")
            yield
            time.sleep(_POLL_S)

    def require_alive(self) -> None:
        """Raise TightbeamError with the last words of the first child that has ended."""
        for child in self.started:
            if child.require_alive_or_done():
                raise TightbeamError(
                    f"{child.name} has ended: {child.last_words()}", cure=f"See {child.log}."
                )

    def stop(self) -> None:
        """Ask every process to end, the last one started first; kill what has not after `grace_s`."""
        running = [child.process for child in reversed(self.started) if child.process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + self.grace_s
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                _kill(process)
                process.wait()
        if self._reaper is not None:
            end(self.mark, max(deadline - time.monotonic(), 1.0))
            self._reaper.kill()
            self._reaper.communicate()
            self._reaper = None

    def alive(self) -> list[psutil.Process]:
        """Give every process that is left, with what they have started: all carry the mark."""
        return marked(self.mark)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None:
            print(f"stopped every process; their logs are in {self.logs}", file=sys.stderr)


def _start_reaper(mark: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tightbeam.federation.runtimes.orphans", mark]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, **_OWN_SESSION)  # noqa: S603


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Turn SIGTERM and a closed terminal into SystemExit, so that contexts are left and children stopped."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.signal(getattr(signal, name), leave) for name in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
