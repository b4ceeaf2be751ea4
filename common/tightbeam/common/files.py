"""Files that are written whole or not at all, and the cache folder of this user."""

import contextlib
import errno
import os
import sys
import uuid
from pathlib import Path

from tightbeam.common.errors import TightbeamError

__all__ = ["atomic_write", "cache_folder", "sync_folder", "write_failed"]

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def cache_folder() -> Path:
    """`$TIGHTBEAM_CACHE`, else `~/.cache/tightbeam`: downloaded and converted weights, the demo's files."""
    return Path(os.environ.get("TIGHTBEAM_CACHE") or Path.home() / ".cache" / "tightbeam").absolute()


def write_failed(path: Path, error: OSError) -> TightbeamError:
    """Build the error for a file that could not be written: names it, and says so when the disk is full."""
    if error.errno in _FULL:
        return TightbeamError(
            f"No space left to write {path} ({error.strerror}).",
            cure="What was saved before is intact. Free some space, then go on with --resume.",
        )
    return TightbeamError(
        f"Cannot write {path}: {error.strerror or error}.", cure="Check the folder's permissions."
    )


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replace a file by `data`, whole or not at all, and durable when this returns.

    Raises:
        TightbeamError: the disk is full or the folder cannot be written; the old file is as it was.

    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # random, for containers have the same process ids; not mkstemp: its 0600 would follow the file to its
        # place, where others may need to read it
        temporary = str(path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp"))
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise write_failed(path, error) from error


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable; Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
