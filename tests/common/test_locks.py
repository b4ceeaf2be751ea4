"""One process at a time in a folder, whoever died in it before and wherever it lies."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tightbeam.common import locks
from tightbeam.common.errors import UsageError
from tightbeam.common.locks import FolderLock, Holder

HOLD = """
import sys, time
from pathlib import Path
from tightbeam.common.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]), what="It", cure="Wait.")
print("held", flush=True)
time.sleep(60)
"""


def take(folder: Path, said: list[str] | None = None) -> FolderLock:
    warn = (lambda line: None) if said is None else said.append
    return FolderLock(folder, what=f"The folder {folder}", cure="Wait.", warn=warn)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that is in use, so that it stays."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    return tmp_path / "run"


def no_locks(handle: int) -> None:
    """Stands for `flock` on a file system that keeps none, as some network mounts do."""
    raise OSError(errno.ENOLCK, "No locks available")


def note(folder: Path, holder: Holder) -> None:
    facts = {"pid": holder.pid, "host": holder.host, "started_unix_s": holder.started_unix_s}
    (folder / "lock").write_text(json.dumps(facts))


def test_another_process_is_named_until_it_is_killed(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            named = (
                rf"in use by process {other.pid} on {socket.gethostname()}, started 20\d\d-.* UTC\. Wait\."
            )
            with pytest.raises(UsageError, match=named):
                take(folder)
        finally:
            other.kill()
    said: list[str] = []
    take(folder, said).release()
    assert said == []


def test_two_of_one_process_exclude_each_other(folder: Path) -> None:
    with take(folder), pytest.raises(UsageError, match=f"in use by process {os.getpid()} "):
        take(folder)
    take(folder).release()


def test_an_unused_folder_goes_away_and_comes_back(tmp_path: Path) -> None:
    for _ in range(2):
        with take(tmp_path / "a" / "run"):
            assert (tmp_path / "a" / "run" / "lock").is_file()
        assert not (tmp_path / "a" / "run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_who_waited_while_the_folder_went_away_does_not_hold_a_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real, first = tmp_path / "run", locks.lock_file, take(tmp_path / "run")

    def late(handle: int) -> None:  # opened before the first let go, locks after
        first.release()
        real(handle)

    monkeypatch.setattr(locks, "lock_file", late)
    with take(run):
        monkeypatch.setattr(locks, "lock_file", real)
        with pytest.raises(UsageError, match="in use"):
            take(run)


def test_without_locks_a_process_of_this_machine_is_known_by_its_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "lock_file", no_locks)
    note(folder, Holder.this())
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()} "):
        take(folder)
    ended = Holder(os.getpid(), socket.gethostname(), Holder.this().started_unix_s - 1e6)  # its pid, anew
    note(folder, ended)
    with take(folder):
        assert Holder.this() == Holder(**json.loads((folder / "lock").read_text()))


def test_one_of_another_machine_that_did_not_let_go_is_told(folder: Path) -> None:
    note(folder, Holder(7, "elsewhere.example", 1.7e9))
    said: list[str] = []
    take(folder, said).release()
    assert len(said) == 1
    assert "process 7 on elsewhere.example, started 2023-11-14" in said[0]
    take(folder, said).release()  # this one did let go
    assert len(said) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "\x00" * 2000])
def test_a_note_that_nobody_can_read_is_no_holder(folder: Path, content: str) -> None:
    (folder / "lock").write_text(content)
    said: list[str] = []
    take(folder, said).release()
    assert said == []
