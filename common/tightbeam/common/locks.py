"""One process at a time in a folder: a lock that the system drops when its holder dies, however it dies.

`<folder>/lock` also says who holds it: process id, machine and start time. Where a file system keeps no
locks, or none between machines, that note is all there is: a process of this machine that still runs is
refused by it, and one of another machine, of which nobody here can tell, is named in a warning.
"""

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import psutil

from tightbeam.common.errors import UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["FolderLock", "Holder", "lock_file"]

_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds, or held, a lock."""

    pid: int
    host: str
    started_unix_s: float  # the process, so that a pid that was given anew is not taken for it

    @classmethod
    def this(cls) -> Self:
        """The process that asks."""
        return cls(os.getpid(), socket.gethostname(), psutil.Process().create_time())

    @classmethod
    def read(cls, file: BinaryIO) -> Self | None:
        """Who is named in a lock's file; None when it was let go, or holds something else."""
        file.seek(0)
        try:
            found = json.loads(file.read(1000))
            return cls(int(found["pid"]), str(found["host"]), float(found["started_unix_s"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_running_here(self) -> bool:
        """Whether it is a process of this machine that has not ended."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started_unix_s) < 2.0
        except psutil.Error:
            return False

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started_unix_s, UTC)
        return f"process {self.pid} on {self.host}, started {since:%Y-%m-%d %H:%M:%S} UTC"


class FolderLock:
    """Holds `<folder>/lock` until `release()`; makes the folder, and takes an unused one away again."""

    def __init__(
        self, folder: Path, *, what: str, cure: str, warn: Callable[[str], None] = lambda line: None
    ) -> None:
        """Raises `UsageError`, with `cure`, when another process holds the lock of `what`."""
        self._path = folder / "lock"
        self._file, locked = self._open()
        before = Holder.read(self._file)
        if locked is None or (locked is False and before is not None and before.is_running_here()):
            self._file.close()
            who = "another process" if before is None else str(before)
            raise UsageError(f"{what} is in use by {who}.", cure=cure)
        if before is not None and before.host != socket.gethostname():
            warn(f"{what} was last held by {before}, which did not let go. Make sure that it has ended.")
        self._note(json.dumps(asdict(Holder.this())))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self, *, remove: bool = False) -> None:
        """Let the next one in; with `remove` the file goes too, whatever else the folder holds."""
        if self._file.closed:
            return
        self._note("")
        folder = self._path.parent
        remove |= folder.exists() and [path.name for path in folder.iterdir()] == ["lock"]
        if remove and sys.platform != "win32":  # still held: whoever waits sees that the file is gone
            self._remove()
        self._file.close()  # closing drops the lock
        if remove and sys.platform == "win32":  # where an open file cannot be removed
            self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._path.parent.rmdir()

    def _open(self) -> tuple[BinaryIO, bool | None]:
        """The lock's file, and whether it is ours; None when another has it, False without such locks."""
        while True:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = self._path.open("a+b")
            except FileNotFoundError:
                continue  # an unused folder was taken away in between
            try:
                lock_file(file.fileno())
            except OSError as error:
                return file, None if error.errno in _TAKEN else False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self._path.stat(), os.fstat(file.fileno())):
                    return file, True
            file.close()

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            self._file.truncate(0)
            self._file.write(text.encode())
            self._file.flush()


def lock_file(handle: int) -> None:
    """Lock an open file; raises OSError when another process has."""
    if sys.platform == "win32":
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond a note: what is locked cannot be read by others
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
