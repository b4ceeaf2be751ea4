"""One process at a time: a lock that the operating system drops when its holder dies, however it dies."""

import os
import sys
from pathlib import Path

from tightbeam.common.errors import UsageError

__all__ = ["FolderLock"]


class FolderLock:
    """Holds `<folder>/lock` until `release()`."""

    def __init__(self, folder: Path) -> None:
        """Raises `UsageError` when another process holds it."""
        self._file = (folder / "lock").open("a+b")
        try:
            _lock(self._file.fileno())
        except OSError:
            self._file.close()
            raise UsageError(
                f"The cache {folder} is in use by another process.",
                cure="Wait until it ends, or give this run its own cache.dir.",
            ) from None

    def release(self) -> None:
        """Let the next one in."""
        self._file.close()  # closing drops the lock


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
