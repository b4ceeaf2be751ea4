"""The cloud's ledger: billed once, durable before the answer, refused when shared."""

import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from support.postgres import postgres_url
from tightbeam.cloud.ledger import Billed, Ledger, LedgerEntry, _is, _values
from tightbeam.cloud.ledger_store import RUNS, STEPS, sums_of_steps
from tightbeam.common.accounts.rows import StepBytes
from tightbeam.common.errors import CloudUnavailableError, LedgerError, StepConflictError, UsageError

BYTES = StepBytes(
    payload_up_bytes=1000,
    payload_down_bytes=2000,
    sealed_up_bytes=1050,
    sealed_down_bytes=2050,
    wire_up_bytes=1100,
    wire_down_bytes=2100,
)
ENTRY = LedgerEntry(
    tenant="clinic",
    run="run-a",
    step=0,
    kind="forward",
    request_sha256="aa" * 32,
    tokens=64,
    segments=2,
    bytes=BYTES,
    flops=10**12,
    queue_s=0.25,
    compute_s=0.5,
    retention="hold",
)


class LedgerContract:
    """What every storage must do; a fixture `address` of the subclass says where the ledger lives."""

    @pytest.fixture
    def ledger(self, address: str) -> Iterator[Ledger]:
        ledger = Ledger(address)
        yield ledger
        ledger.close()

    def test_a_new_step_is_billed_and_found(self, ledger: Ledger) -> None:
        assert ledger.record(ENTRY) == Billed(before=None)
        assert ledger.find("clinic", "run-a", 0, "forward") == ENTRY

    def test_absent_steps_are_none(self, ledger: Ledger) -> None:
        ledger.record(ENTRY)
        assert ledger.find("clinic", "run-a", 0, "backward") is None
        assert ledger.find("other", "run-a", 0, "forward") is None
        assert ledger.usage("other") == []

    def test_a_resent_step_is_billed_once(self, ledger: Ledger) -> None:
        ledger.record(ENTRY)
        again = replace(ENTRY, bytes=BYTES + BYTES, queue_s=9.0, retention="recompute")
        for _ in range(3):
            billed = ledger.record(again)
            assert not billed.is_new
            assert billed.before == BYTES
        (usage,) = ledger.usage("clinic")
        assert usage.bytes == BYTES
        assert usage.forward_steps == 1
        assert usage.reexecuted_steps == 3

    def test_another_content_under_the_same_key_is_refused(self, ledger: Ledger) -> None:
        ledger.record(ENTRY)
        with pytest.raises(StepConflictError, match="another content"):
            ledger.record(replace(ENTRY, request_sha256="bb" * 32))
        (usage,) = ledger.usage("clinic")
        assert usage.reexecuted_steps == 0
        assert ledger.record(replace(ENTRY, step=1)).is_new  # the refusal leaves the ledger usable

    @pytest.mark.parametrize(
        "change", [{"tenant": "lab"}, {"run": "run-b"}, {"step": 1}, {"kind": "backward"}], ids=str
    )
    def test_every_part_of_the_key_counts(self, ledger: Ledger, change: dict[str, Any]) -> None:
        ledger.record(ENTRY)
        assert ledger.record(replace(ENTRY, **change)).is_new

    def test_usage_sums_by_run(self, ledger: Ledger) -> None:
        for step in range(3):
            for kind in ("forward", "backward"):
                ledger.record(replace(ENTRY, step=step, kind=kind))
        ledger.record(replace(ENTRY, run="run-b", tokens=7))
        first, second = ledger.usage("clinic")
        assert (first.run, second.run) == ("run-a", "run-b")
        assert (first.forward_steps, first.backward_steps, first.tokens) == (3, 3, 6 * 64)
        assert first.bytes.wire_total_bytes == 6 * 3200
        assert (first.queue_s, first.compute_s) == (1.5, 3.0)
        assert (second.forward_steps, second.backward_steps, second.tokens) == (1, 0, 7)
        assert ledger.usage("clinic", ["run-b"]) == [second]

    def test_usage_comes_in_pages(self, ledger: Ledger) -> None:
        names = [f"run-{n:02}" for n in range(7)]
        for name in reversed(names):
            ledger.record(replace(ENTRY, run=name))
            ledger.record(replace(ENTRY, run=name, tenant="other"))
        seen, after = [], ""
        while page := ledger.usage("clinic", after=after, limit=3):
            assert len(page) <= 3
            seen += [usage.run for usage in page]
            after = seen[-1]
        assert seen == names

    def test_sums_are_those_of_the_steps(self, ledger: Ledger) -> None:
        for step in range(4):
            for run in ("a", "b"):
                ledger.record(replace(ENTRY, run=run, step=step, flops=2**62 + step, tokens=step))
                ledger.record(replace(ENTRY, run=run, step=step, flops=2**62 + step, tokens=step))
        scan = ledger._connection.execute(sums_of_steps().order_by(STEPS.c.run)).mappings().all()
        kept = ledger._connection.execute(RUNS.select().order_by(RUNS.c.run)).mappings().all()
        assert [dict(row) for row in kept] == [dict(row) for row in scan]

    def test_flops_of_a_long_run_are_exact(self, ledger: Ledger) -> None:
        most = 2**63 - 1
        for step in range(5):
            ledger.record(replace(ENTRY, step=step, flops=most))
        (usage,) = ledger.usage("clinic")
        assert usage.flops == 5 * most

    def test_rows_outlive_the_ledger_object(self, address: str) -> None:
        first = Ledger(address)
        first.record(ENTRY)
        first.close()
        second = Ledger(address)
        assert second.record(ENTRY).before == BYTES
        second.close()

    def test_threads_bill_each_step_once(self, ledger: Ledger) -> None:
        new: list[int] = []

        def bill() -> None:
            new.extend(step for step in range(20) if ledger.record(replace(ENTRY, step=step)).is_new)

        threads = [threading.Thread(target=bill) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (usage,) = ledger.usage("clinic")
        assert sorted(new) == list(range(20))
        assert (usage.forward_steps, usage.reexecuted_steps) == (20, 60)


class TestSqliteFile(LedgerContract):
    """The default storage."""

    @pytest.fixture
    def address(self, tmp_path: Path) -> str:
        return str(tmp_path / "ledger.db")

    def test_runs_with_full_durability(self, ledger: Ledger) -> None:
        read = ledger._connection.exec_driver_sql
        assert read("PRAGMA journal_mode").scalar() == "wal"
        assert read("PRAGMA synchronous").scalar() == 2  # FULL
        assert read("PRAGMA locking_mode").scalar() == "exclusive"

    def test_a_second_process_is_refused(self, address: str, ledger: Ledger) -> None:
        ledger.record(ENTRY)
        code = (
            "import sys; from tightbeam.cloud.ledger import Ledger; "
            "from tightbeam.common.errors import UsageError\n"
            "try: Ledger(sys.argv[1])\n"
            "except UsageError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, address], capture_output=True, text=True, check=True
        )
        assert "no other process has it open" in done.stdout
        assert ledger.record(replace(ENTRY, step=1)).is_new

    def test_a_folder_that_does_not_exist_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"nowhere.*cannot be opened"):
            Ledger(tmp_path / "nowhere" / "ledger.db")

    def test_a_question_costs_the_same_whatever_was_billed(self, ledger: Ledger) -> None:
        """Usage is read under the lock that billing needs, so it must not scan; in SQLite's instructions."""
        worked: list[int] = []
        connection = ledger._connection.connection.driver_connection
        assert isinstance(connection, sqlite3.Connection)

        def instructions() -> int:
            worked.clear()
            connection.set_progress_handler(lambda: worked.append(1) or 0, 10)  # type: ignore[func-returns-value]
            (usage,) = ledger.usage("clinic")
            connection.set_progress_handler(None, 0)
            assert usage.tokens == 64 * usage.forward_steps
            return len(worked)

        ledger.record(ENTRY)
        few = instructions()
        for step in range(1, 500):
            ledger.record(replace(ENTRY, step=step))
        assert instructions() <= few + 2
        scan = sums_of_steps()  # negative control: the scan is seen
        connection.set_progress_handler(lambda: worked.append(1) or 0, 10)  # type: ignore[func-returns-value]
        ledger._connection.execute(scan).all()
        connection.set_progress_handler(None, 0)
        assert len(worked) > 10 * few

    def test_a_full_disk_bills_nothing(self, ledger: Ledger) -> None:
        ledger.record(ENTRY)
        pages = ledger._connection.exec_driver_sql("PRAGMA page_count").scalar()
        ledger._connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        ledger._connection.rollback()
        acknowledged: list[int] = []

        def fill() -> None:
            for step in range(1, 1000):
                ledger.record(replace(ENTRY, step=step))
                acknowledged.append(step)

        with pytest.raises(CloudUnavailableError, match="Nothing was billed"):
            fill()
        (usage,) = ledger.usage("clinic")
        assert usage.forward_steps == 1 + len(acknowledged)


class TestPostgres(LedgerContract):
    """A database of a server that the tests start; skipped where there is none."""

    @pytest.fixture
    def address(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        url = postgres_url()
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE IF EXISTS steps, runs")
        engine.dispose()
        return url

    def test_a_lost_connection_is_transient(self, ledger: Ledger) -> None:
        ledger.record(ENTRY)
        with sa.create_engine(ledger._store._engine.url, poolclass=sa.NullPool).begin() as other:
            other.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()"
            )
        with pytest.raises(CloudUnavailableError, match="Nothing was billed"):
            ledger.record(replace(ENTRY, step=1))
        assert ledger.record(replace(ENTRY, step=1)).is_new
        assert not ledger.record(ENTRY).is_new

    def test_a_dropped_table_is_not(self, ledger: Ledger) -> None:
        ledger._connection.exec_driver_sql("DROP TABLE steps")
        ledger._connection.commit()
        for _ in range(2):
            with pytest.raises(LedgerError, match="has lost its ledger"):
                ledger.record(ENTRY)


def test_postgresql_can_read_every_statement() -> None:
    """Compiled, not run: a construct that PostgreSQL's dialect does not have would raise."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it bare
    key = ENTRY.key
    statements = [
        STEPS.insert().values(_values(ENTRY)),
        STEPS.select().where(*_is(key)),
        STEPS.update().where(*_is(key)).values(reexecuted=STEPS.c.reexecuted + 1),
        sums_of_steps(),
    ]
    texts = [str(statement.compile(dialect=dialect)) for statement in statements]
    assert "sum(steps.flops / " in texts[3]  # integer division there
    assert "BIGINT" in str(CreateTable(STEPS).compile(dialect=dialect))


WRITER = """
import sys
from tightbeam.cloud.ledger import Ledger, LedgerEntry
from tightbeam.common.accounts.rows import StepBytes
ledger, step = Ledger(sys.argv[1]), int(sys.argv[2])
while True:
    step += 1
    ledger.record(LedgerEntry(tenant="clinic", run="run-a", step=step, kind="forward", tokens=1, segments=1,
        request_sha256="aa" * 32, bytes=StepBytes(), flops=1, queue_s=0, compute_s=0, retention="hold"))
    print(step, flush=True)
"""


def _lost(ledger: Ledger, acknowledged: list[int]) -> list[int]:
    return [step for step in acknowledged if ledger.find("clinic", "run-a", step, "forward") is None]


def test_killed_at_random_moments_it_keeps_every_acknowledged_row(tmp_path: Path) -> None:
    path, last = tmp_path / "ledger.db", 0
    moments = random.Random(20)
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(last)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        first = writer.stdout.readline()
        assert first, "the writer died by itself"
        time.sleep(moments.uniform(0.0, 0.15))
        writer.kill()
        acknowledged = [int(line) for line in (first + writer.stdout.read()).split("\n")[:-1]]
        writer.stdout.close()
        writer.wait()
        assert acknowledged == list(range(last + 1, last + 1 + len(acknowledged)))

        ledger = Ledger(path)
        (usage,) = ledger.usage("clinic")
        # The step in flight at the kill may be there or not; every one before it is, once.
        assert usage.forward_steps in (acknowledged[-1], acknowledged[-1] + 1)
        assert _lost(ledger, acknowledged) == []
        last = usage.forward_steps
        ledger.close()
    assert last > 50


def test_the_kill_rig_notices_a_lost_row(tmp_path: Path) -> None:
    """Negative control: a row removed behind the ledger's back is missed."""
    path = tmp_path / "ledger.db"
    ledger = Ledger(path)
    for step in (1, 2, 3):
        ledger.record(replace(ENTRY, step=step))
    ledger._connection.execute(sa.text("DELETE FROM steps WHERE step = 2"))
    ledger._connection.commit()
    assert _lost(ledger, [1, 2, 3]) == [2]
    ledger.close()


def test_a_ledger_without_sums_gets_them(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    for step in range(5):
        ledger.record(replace(ENTRY, step=step, flops=2**62))
    before = ledger.usage("clinic")
    ledger._connection.exec_driver_sql("DROP TABLE runs")
    ledger._connection.commit()
    ledger.close()
    again = Ledger(tmp_path / "ledger.db")
    assert again.usage("clinic") == before
    again.close()


def _damaged(path: Path) -> None:
    ledger = Ledger(path)
    for step in range(400):
        ledger.record(replace(ENTRY, step=step))
    ledger.close()
    with path.open("r+b") as file:
        file.seek(5 * 4096)
        file.write(b"\xa5" * 8192)


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE moz_places (id INTEGER)")
    connection.close()


def _older(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE steps (tenant TEXT, run TEXT)")
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_damaged, "is damaged"),
        (_foreign, "another program's database"),
        (_older, "not one of a ledger of this version"),
        (lambda path: path.write_text("no database\n" * 999), "file is not a database"),
    ],
    ids=["damaged", "foreign", "older", "text"],
)
def test_what_is_no_whole_ledger_is_refused_at_the_start(
    tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "ledger.db"
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=f"{said}.*Restore the ledger"):
        Ledger(path)
    assert path.read_bytes() == before or spoil in (_foreign, _older)  # those become WAL files


def _removed(path: Path) -> None:
    path.unlink()


def _journal_removed(path: Path) -> None:
    path.with_name("ledger.db-wal").unlink()


def _replaced(path: Path) -> None:
    path.rename(path.with_name("moved.db"))
    path.write_bytes(path.with_name("moved.db").read_bytes())


@pytest.mark.parametrize("spoil", [_removed, _journal_removed, _replaced])
def test_a_ledger_that_is_lost_while_it_is_open_bills_nothing(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path)
    ledger.record(ENTRY)
    ledger.check()
    spoil(path)
    for work in (ledger.check, lambda: ledger.record(replace(ENTRY, step=1)), lambda: ledger.usage("clinic")):
        with pytest.raises(LedgerError, match=r"removed or replaced.*Nothing was billed"):
            work()
    ledger.close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense://host/db", "database driver"),
        ("postgresql+nonsense://host/db", "database driver"),
        ("://", "no SQLAlchemy URL"),
        ("postgresql://nobody:secret@127.0.0.1:1/db", "cannot be opened"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(address: str, said: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(UsageError, match=said) as caught:
        Ledger(address)
    assert "secret" not in str(caught.value)
