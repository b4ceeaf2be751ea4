"""Ends every process that carries a mark once nobody holds the other end of its standard input.

    python -m tightbeam.federation.runtimes.orphans MARK

A process that is killed cannot stop its children; the system closes its pipes all the same, and this is who
notices. Marks are names in the environment, which what children start inherits, however detached.
"""

import contextlib
import sys

import psutil

__all__ = ["end", "marked"]

_KILLS = 3  # a process may start another just before it is killed


def marked(mark: str) -> list[psutil.Process]:
    """Give every live process that has `mark` in its environment."""
    return [process for process in psutil.process_iter() if _carries(process, mark)]


def end(mark: str, within_s: float) -> None:
    """Ask all of them to end, and kill what has not after `within_s`, with what was started meanwhile."""
    found = marked(mark)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(found, within_s)
    for _ in range(_KILLS):
        found = marked(mark)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, within_s)  # at once if there is none


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and mark in process.environ()
    except (psutil.Error, OSError):  # it has just ended, or is another user's
        return False


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end(sys.argv[1], within_s=10.0)
