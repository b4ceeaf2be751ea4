"""The cloud's durable account: what every tenant's every step cost, written before the reply goes out.

At-least-once execution, exactly-once accounting: the primary key `(tenant, run, step, kind)` admits one row
per step. A step that runs a second time (its reply was lost, a held graph was evicted) finds its row, is not
billed again and counts as re-executed; the same key with another content is refused.

SQLite by default, in WAL mode with synchronous=FULL: a row is on the disk when `record` returns. The file is
opened in exclusive mode, so a second process is refused instead of sharing it: two connections that write at
once can corrupt a WAL in SQLite before 3.51.3. Inspect a ledger through `Usage` while the cloud runs, with
any SQLite client when it has stopped. Any other SQLAlchemy URL gets the same portable SQL; PostgreSQL is the
one meant.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError

from tightbeam.common.costs.rows import StepBytes
from tightbeam.common.errors import CloudUnavailableError, StepConflictError, UsageError

__all__ = ["Billed", "Ledger", "LedgerEntry", "RunUsage"]

_log = logging.getLogger(__name__)

_BYTE_COLUMNS: Final = tuple(f.name for f in fields(StepBytes))
_FIXED_WAL_VERSION: Final = (3, 51, 3)
# FLOPs of a long run pass 2^63; SQL sums quotient and remainder, Python joins them exactly.
_FLOPS_UNIT: Final = 1 << 20

_metadata = sa.MetaData()
_steps = sa.Table(
    "steps",
    _metadata,
    sa.Column("tenant", sa.String(255), primary_key=True),
    sa.Column("run", sa.String(255), primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("request_sha256", sa.String(64), nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("segments", sa.BigInteger, nullable=False),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in _BYTE_COLUMNS),
    sa.Column("flops", sa.BigInteger, nullable=False),
    sa.Column("queue_s", sa.Double, nullable=False),
    sa.Column("compute_s", sa.Double, nullable=False),
    sa.Column("retention", sa.String(16), nullable=False),
    sa.Column("reexecuted", sa.BigInteger, nullable=False),
    sa.Column("recorded_unix_s", sa.Double, nullable=False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One executed step, as it will be billed."""

    tenant: str
    run: str
    step: int
    kind: str
    """"forward" or "backward"."""
    request_sha256: str
    """SHA-256 (hex) of the request's content; tells a resent step from another one under the same key."""
    tokens: int
    segments: int
    bytes: StepBytes
    flops: int
    queue_s: float
    compute_s: float
    retention: Literal["hold", "recompute"]

    @property
    def key(self) -> tuple[str, str, int, str]:
        """`(tenant, run, step, kind)`."""
        return self.tenant, self.run, self.step, self.kind


@dataclass(frozen=True, slots=True)
class Billed:
    """What the ledger did with an entry."""

    before: StepBytes | None
    """Set when this key was billed earlier: the bytes that the tenant paid for then."""

    @property
    def is_new(self) -> bool:
        """Whether this entry was billed now."""
        return self.before is None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunUsage:
    """What one run has used, summed over its billed steps."""

    run: str
    forward_steps: int
    backward_steps: int
    tokens: int
    bytes: StepBytes
    flops: int
    queue_s: float
    compute_s: float
    reexecuted_steps: int


class Ledger:
    """The ledger at a file path or SQLAlchemy URL: one writer connection, safe to call from any thread.

    Raises:
        UsageError: the ledger cannot be opened, or another process has it open.

    """

    def __init__(self, url_or_path: str | Path) -> None:
        url = _url(url_or_path)
        self._name = url.render_as_string(hide_password=True)
        self._lock = threading.Lock()
        self._engine = _engine(url)
        try:
            self._connection = self._engine.connect()
            _metadata.create_all(self._connection)
            self._connection.commit()
        except DBAPIError as error:
            self._engine.dispose()
            raise UsageError(
                f"The ledger {self._name} cannot be opened: {error.orig}.",
                cure="Check that its folder can be written and that no other process has it open.",
            ) from error

    def record(self, entry: LedgerEntry) -> Billed:
        """Bill `entry` unless its key was billed before; the row is durable when this returns.

        Raises:
            StepConflictError: the key was billed before with another content.
            CloudUnavailableError: the ledger cannot be written; nothing was billed.

        """
        with self._lock:
            try:
                return self._record(entry)
            except DBAPIError as error:
                self._connection.rollback()
                raise CloudUnavailableError(
                    f"The cloud cannot write its ledger: {error.orig}.",
                    cure="Nothing was billed. Ask the operator to check the ledger's disk or database.",
                ) from error

    def find(self, tenant: str, run: str, step: int, kind: str) -> LedgerEntry | None:
        """Return the billed entry of a step, or None."""
        with self._lock:
            row = self._row((tenant, run, step, kind))
            self._connection.rollback()
        return None if row is None else _entry(row)

    def usage(self, tenant: str, runs: Sequence[str] | None = None) -> list[RunUsage]:
        """Sum up what `tenant` has used, by run in the order of their names; `runs` selects some."""
        query = _usage_query().where(_steps.c.tenant == tenant)
        if runs:
            query = query.where(_steps.c.run.in_(runs))
        with self._lock:
            rows = self._connection.execute(query).mappings().all()
            self._connection.rollback()
        return [_usage(row) for row in rows]

    def close(self) -> None:
        """Release the ledger; for SQLite this also folds the WAL into the file."""
        with self._lock:
            self._connection.close()
            self._engine.dispose()

    def _record(self, entry: LedgerEntry) -> Billed:
        # Insert first: the primary key decides, also between replicas that share one PostgreSQL.
        try:
            self._connection.execute(_steps.insert().values(_values(entry)))
            self._connection.commit()
        except IntegrityError:
            self._connection.rollback()
            return self._record_again(entry)
        return Billed(before=None)

    def _record_again(self, entry: LedgerEntry) -> Billed:
        row = self._row(entry.key)
        assert row is not None, "rows are never deleted, and the insert just met this one"
        stored = _entry(row)
        if stored.request_sha256 != entry.request_sha256:
            self._connection.rollback()
            raise StepConflictError(
                f"Run {entry.run!r} sent step {entry.step} ({entry.kind}) before with another content.",
                cure="Start a new run, or resume from a checkpoint that was written before this step.",
            )
        again = _steps.update().where(*_is(entry.key)).values(reexecuted=_steps.c.reexecuted + 1)
        self._connection.execute(again)
        self._connection.commit()
        return Billed(before=stored.bytes)

    def _row(self, key: tuple[str, str, int, str]) -> sa.RowMapping | None:
        return self._connection.execute(_steps.select().where(*_is(key))).mappings().one_or_none()


def _url(url_or_path: str | Path) -> sa.URL:
    text = str(url_or_path)
    if "://" in text:
        return sa.make_url(text)
    return sa.URL.create("sqlite", database=text)


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, poolclass=sa.NullPool)
    if sqlite3.sqlite_version_info < _FIXED_WAL_VERSION:
        _log.info("SQLite %s: only one process can have a ledger open.", sqlite3.sqlite_version)
    # One connection, used by several threads one after the other under the ledger's lock.
    options = {"check_same_thread": False, "timeout": 2.0}
    engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=options)
    event.listen(engine, "connect", _make_durable)
    return engine


def _make_durable(connection: sqlite3.Connection, _record: object) -> None:
    # Exclusive comes before WAL: then no other process can ever map the shared index.
    for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}").close()


def _is(key: tuple[str, str, int, str]) -> tuple[sa.ColumnElement[bool], ...]:
    names = ("tenant", "run", "step", "kind")
    return tuple(_steps.c[name] == value for name, value in zip(names, key, strict=True))


def _values(entry: LedgerEntry) -> dict[str, Any]:
    flat = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name != "bytes"}
    return {**flat, **asdict(entry.bytes), "reexecuted": 0, "recorded_unix_s": time.time()}


def _entry(row: sa.RowMapping) -> LedgerEntry:
    plain = {f.name: row[f.name] for f in fields(LedgerEntry) if f.name != "bytes"}
    return LedgerEntry(bytes=StepBytes(**{name: row[name] for name in _BYTE_COLUMNS}), **plain)


def _usage_query() -> sa.Select[Any]:
    total = {name: sa.func.sum(_steps.c[name]) for name in ("tokens", *_BYTE_COLUMNS, "queue_s", "compute_s")}
    counted = {
        f"{kind}_steps": sa.case((_steps.c.kind == kind, 1), else_=0) for kind in ("forward", "backward")
    }
    return (
        sa.select(
            _steps.c.run,
            *(expression.label(name) for name, expression in total.items()),
            *(sa.func.sum(case).label(name) for name, case in counted.items()),
            sa.func.sum(_steps.c.flops // _FLOPS_UNIT).label("flops_units"),
            sa.func.sum(_steps.c.flops % _FLOPS_UNIT).label("flops_rest"),
            sa.func.sum(_steps.c.reexecuted).label("reexecuted_steps"),
        )
        .group_by(_steps.c.run)
        .order_by(_steps.c.run)
    )


def _usage(row: sa.RowMapping) -> RunUsage:
    # PostgreSQL sums bigints as Decimal, hence int().
    counts = ("forward_steps", "backward_steps", "tokens", "reexecuted_steps")
    return RunUsage(
        run=row["run"],
        bytes=StepBytes(**{name: int(row[name]) for name in _BYTE_COLUMNS}),
        flops=int(row["flops_units"]) * _FLOPS_UNIT + int(row["flops_rest"]),
        queue_s=float(row["queue_s"]),
        compute_s=float(row["compute_s"]),
        **{name: int(row[name]) for name in counts},
    )
