"""`tightbeam` as its own process, many times, without importing torch each time.

Processes are forked from a server that has the imports but no thread and no channel; each has its own files,
limits, signals and exit code. What the command prints goes to files.
"""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from support.clouds import free_port

__all__ = ["Cloud", "Command", "Finished", "run_command"]

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "tightbeam.cli.app",
        "tightbeam.cloud.server",
        "tightbeam.edge.training.run",
        "transformers.models.llama.modeling_llama",
    ]
)


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that begins with "error: "."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.err, self.err
        assert len(lines) == 1, self.err
        return lines[0]


class Command:
    """One running command; its working directory is `folder`."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        max_file_bytes: int | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("out.*")))
        self._out, self._err = folder / f"out.{number}", folder / f"err.{number}"
        self.process = _FORKS.Process(
            target=_main,
            args=(arguments, folder, self._out, self._err, dict(environment or {}), max_file_bytes, before),
            daemon=True,
        )
        self.process.start()

    @property
    def out(self) -> str:
        """What it printed so far."""
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        """What it said on stderr so far."""
        return self._err.read_text() if self._err.exists() else ""

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.join(30)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = 90.0) -> Finished:
        """Wait for its end."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"the command did not end:\n{self.err}")
        return Finished(self.process.exitcode, self.out, self.err)

    def wait_until(self, done: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait until `done()`, which must come before the command ends."""
        until_s = time.monotonic() + timeout_s
        while not done():
            assert self.process.is_alive(), f"the command ended:\n{self.err}"
            assert time.monotonic() < until_s, f"it did not happen:\n{self.err}"
            time.sleep(0.02)


def run_command(folder: Path, *arguments: str, max_file_bytes: int | None = None) -> Finished:
    """Run a command to its end."""
    return Command(folder, *arguments, max_file_bytes=max_file_bytes).wait()


class Cloud:
    """`tightbeam serve`, ready in a second; killed and started again on the same port and ledger."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *options: str,
        before: Callable[[], None] | None = None,
        max_file_bytes: int | None = None,
    ) -> None:
        self.port = free_port()
        self.folder, self._before, self._max_file_bytes = folder, before, max_file_bytes
        self._arguments = ["serve", "--model", str(model), "--listen", self.address, *options]
        if "--identity" not in options:
            self._arguments.append("--insecure")
        self.start()

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What the running process has logged."""
        return self.command.err

    def start(self, *options: str) -> None:
        """Start, with further `options` if need be, and wait until it accepts steps."""
        self.command = Command(
            self.folder, *self._arguments, *options, before=self._before, max_file_bytes=self._max_file_bytes
        )
        self.command.wait_until(lambda: bool(self.command.out))

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nothing is said."""
        self.command.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _main(
    arguments: tuple[str, ...],
    folder: Path,
    out: Path,
    err: Path,
    environment: Mapping[str, str],
    max_file_bytes: int | None,
    before: Callable[[], None] | None,
) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "TIGHTBEAM_CACHE": str(folder / "cache"), **environment}
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if before is not None:
        before()
    from tightbeam.cli.app import main

    main(arguments)
