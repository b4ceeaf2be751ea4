"""What a child has started ends with it, even detached or orphaned; nobody else's process is touched."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tightbeam.common.errors import TightbeamError
from tightbeam.federation.runtimes.processes import Child, Children

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# Starts a process in a session of its own, as Flower's SuperLink does, tells its number, and sleeps.
DETACHING = [
    sys.executable,
    "-c",
    "import subprocess, sys, time;"
    f"child = subprocess.Popen({SLEEP!r}, start_new_session=True);"
    "print(child.pid, flush=True); time.sleep(60)",
]


def _detaching(children: Children) -> tuple[Child, psutil.Process]:
    child = children.start("parent", DETACHING)
    return child, psutil.Process(int(child.first_answer(30)))


def _ends(process: psutil.Process) -> bool:
    """Whether it is gone, or waits to be reaped by a process that does not care."""
    deadline_s = time.monotonic() + 15
    while time.monotonic() < deadline_s:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal to send")
def test_what_a_killed_parent_leaves_behind_ends_too(tmp_path: Path) -> None:
    """SIGKILL gives no chance to stop anything; its pipes close all the same."""
    code = (
        "import sys, time; from pathlib import Path;"
        "from tightbeam.federation.runtimes.processes import Children;"
        f"children = Children(Path({str(tmp_path)!r}));"
        f"child = children.start('detaching', {DETACHING!r});"
        "print(child.process.pid, child.first_answer(30), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        left = [psutil.Process(int(word)) for word in parent.stdout.readline().split()]
        assert len(left) == 2
        parent.kill()
    assert all(map(_ends, left))


def test_what_a_child_has_detached_ends_too(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        _, detached = _detaching(children)
        assert detached.is_running()
        assert {process.pid for process in children.alive()} == {
            children.started[0].process.pid,
            detached.pid,
        }
    assert _ends(detached)
    assert children.alive() == []


def test_what_a_killed_child_leaves_behind_ends_too(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        child, orphan = _detaching(children)
        child.process.kill()
        child.process.wait()
        assert orphan.is_running(), "it outlives its parent by itself"
    assert _ends(orphan)


def test_a_process_of_somebody_else_goes_on(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEP) as other, Children(tmp_path / "a") as mine:
        with Children(tmp_path / "b") as yours:
            yours.start("sleeper", SLEEP)
            sleeper = mine.start("sleeper", SLEEP)
        assert (sleeper.process.poll(), other.poll()) == (None, None)
        other.kill()


def test_children_within_children_carry_both_marks(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path;"
        "from tightbeam.federation.runtimes.processes import Children;"
        f"inner = Children(Path({str(tmp_path / 'inner')!r}));"
        f"print(inner.start('x', {SLEEP!r}).process.pid, flush=True); time.sleep(60)"
    )
    with Children(tmp_path) as children:
        child = children.start("parent", [sys.executable, "-c", code])
        inner = psutil.Process(int(child.first_answer(30)))
        child.process.send_signal(signal.SIGKILL)
    assert _ends(inner)


@pytest.mark.parametrize(("code", "said"), [(3, "ended with code 3: good grief"), (0, "has ended")])
def test_a_service_that_ends_is_noticed(code: int, said: str, tmp_path: Path) -> None:
    end = f"import sys; print('good grief', file=sys.stderr); sys.exit({code})"
    with Children(tmp_path) as children:
        children.require_alive()
        children.start("lasting", SLEEP)
        children.require_alive()
        child = children.start("brief", [sys.executable, "-c", end])
        child.process.wait()
        with pytest.raises(TightbeamError, match=f"brief {said}.*See .*brief.log"):
            children.require_alive()


def test_a_child_starts_where_it_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    with Children(tmp_path) as children:
        child = children.start("x", [sys.executable, "-c", "import os; print(os.getcwd())"], cwd=folder)
        assert Path(child.first_answer(30)) == folder.resolve()
