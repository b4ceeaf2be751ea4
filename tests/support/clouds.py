"""A real cloud process for tests: started, watched, killed and restarted on the same port."""

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["CloudProcess", "free_port", "own_share"]


def own_share(numbers: range) -> Iterator[int]:
    """Those that no test process beside this one gets, shuffled by what no seed of a training repeats."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = numbers[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    return itertools.cycle(random.SystemRandom().sample(share, len(share)))


_PORTS = own_share(range(20_000, 30_000))


def free_port() -> int:
    """A port that was free a moment ago, below those that outgoing connections take for themselves.

    A cloud that is killed must get its port back: an ephemeral one may meanwhile belong to a client, even to
    one that is trying to reach it. Nor may the tests that run beside this one be given it, before the cloud
    listens or while it is dead.
    """
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the ports go round")


class CloudProcess:
    """`tightbeam serve` as its own process; the constructor returns once it accepts steps."""

    def __init__(
        self, model: Path, folder: Path, *options: str, port: int | None = None, wait_s: float = 90.0
    ) -> None:
        self.model, self.folder, self.options = model, folder, options
        self.port = port or free_port()
        self.log = folder / "cloud.log"
        self._wait_s = wait_s
        self.start()

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start (again) on the same port with the same ledger."""
        identity = [] if "--identity" in self.options else ["--insecure"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "tightbeam.cli", "serve", "--model", str(self.model),
                    "--listen", self.address, "--ledger", str(self.folder / "ledger.db"),
                    *identity, *self.options,
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        timer = threading.Timer(self._wait_s, self.process.kill)
        timer.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # the address, printed when steps are accepted
        timer.cancel()
        if not line:
            self._reap()
            raise RuntimeError(f"the cloud did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nothing is said."""
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """SIGTERM: drain and end; gives the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        code = self.process.wait(timeout=60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()
