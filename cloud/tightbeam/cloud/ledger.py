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

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from tightbeam.cloud.ledger_store import BYTE_COLUMNS, FLOPS_UNIT, RUNS, STEPS, SUMS, Store
from tightbeam.common.accounts.rows import StepBytes
from tightbeam.common.errors import StepConflictError

__all__ = ["USAGE_PAGE", "Billed", "Ledger", "LedgerEntry", "RunUsage", "conflict"]

T = TypeVar("T")
USAGE_PAGE: Final = (
    256  # runs in one answer: the billing lock is never held for longer than it takes to read these
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
    reexecuted: int = 0
    """How often it ran again, unbilled; the ledger counts it."""

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
        self._lock = threading.Lock()
        self._store = Store(url_or_path)
        self._connection = self._store.connection

    def record(self, entry: LedgerEntry) -> Billed:
        """Bill `entry` unless its key was billed before; the row is durable when this returns.

        Raises:
            StepConflictError: the key was billed before with another content.
            CloudUnavailableError: the ledger cannot be written now; nothing was billed.
            LedgerError: the ledger is damaged or gone; nothing was billed, and nothing will be.

        """
        return self._locked(lambda: self._record(entry))

    def find(self, tenant: str, run: str, step: int, kind: str) -> LedgerEntry | None:
        """Return the billed entry of a step, or None; raises as `record` does."""
        row = self._locked(lambda: self._row((tenant, run, step, kind)))
        return None if row is None else _entry(row)

    def usage(
        self, tenant: str, runs: Sequence[str] | None = None, *, after: str = "", limit: int = USAGE_PAGE
    ) -> list[RunUsage]:
        """What `tenant` has used, by run in the order of their names, at most `limit` runs from `after` on.

        `runs` selects some.
        """
        query = RUNS.select().where(RUNS.c.tenant == tenant, RUNS.c.run > after)
        if runs:
            query = query.where(RUNS.c.run.in_(runs))
        query = query.order_by(RUNS.c.run).limit(limit)
        rows = self._locked(lambda: self._connection.execute(query).mappings().all())
        return [_usage(row) for row in rows]

    def check(self) -> None:
        """Raise what `record` would raise for a ledger that is damaged, gone or out of reach."""
        self._locked(lambda: self._connection.execute(sa.select(STEPS.c.step).limit(1)).first())

    def close(self) -> None:
        """Release the ledger."""
        with self._lock:
            self._store.close()

    def _locked(self, work: Callable[[], T]) -> T:
        with self._lock:
            self._store.require_whole()
            try:
                result = work()
                self._connection.rollback()  # a statement that only reads leaves no transaction open
            except DBAPIError as error:
                self._connection.rollback()
                raise self._store.trouble(error) from error
            return result

    def _record(self, entry: LedgerEntry) -> Billed:
        # Insert first: the primary key decides, also between replicas that share one PostgreSQL.
        try:
            self._connection.execute(STEPS.insert().values(_values(entry)))
        except IntegrityError:
            self._connection.rollback()
            return self._record_again(entry)
        self._add_up(entry.key[:2], _summands(entry))
        self._connection.commit()
        return Billed(before=None)

    def _record_again(self, entry: LedgerEntry) -> Billed:
        row = self._row(entry.key)
        assert row is not None, "rows are never deleted, and the insert just met this one"
        stored = _entry(row)
        if stored.request_sha256 != entry.request_sha256:
            self._connection.rollback()
            raise conflict(entry)
        again = STEPS.update().where(*_is(entry.key)).values(reexecuted=STEPS.c.reexecuted + 1)
        self._connection.execute(again)
        self._add_up(entry.key[:2], {"reexecuted_steps": 1})
        self._connection.commit()
        return Billed(before=stored.bytes)

    def _add_up(self, run: tuple[str, str], summands: dict[str, float]) -> None:
        more = RUNS.update().where(*_is(run, RUNS))
        more = more.values({name: RUNS.c[name] + value for name, value in summands.items()})
        if self._connection.execute(more).rowcount:
            return
        try:
            with self._connection.begin_nested():
                first = dict.fromkeys(SUMS, 0) | summands | {"tenant": run[0], "run": run[1]}
                self._connection.execute(RUNS.insert().values(first))
        except IntegrityError:  # another replica was first
            self._connection.execute(more)

    def _row(self, key: tuple[str, str, int, str]) -> sa.RowMapping | None:
        return self._connection.execute(STEPS.select().where(*_is(key))).mappings().one_or_none()


def conflict(entry: LedgerEntry) -> StepConflictError:
    """The refusal of an entry whose key was billed with another content."""
    return StepConflictError(
        f"Run {entry.run!r} sent step {entry.step} ({entry.kind}) before with another content.",
        cure="Start a new run, or resume from a checkpoint that was written before this step.",
    )


def _is(key: Sequence[str | int], table: sa.Table = STEPS) -> tuple[sa.ColumnElement[bool], ...]:
    return tuple(column == value for column, value in zip(table.primary_key.columns, key, strict=True))


def _values(entry: LedgerEntry) -> dict[str, Any]:
    flat = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name != "bytes"}
    return {**flat, **asdict(entry.bytes), "reexecuted": 0, "recorded_unix_s": time.time()}


def _summands(entry: LedgerEntry) -> dict[str, float]:
    units, rest = divmod(entry.flops, FLOPS_UNIT)
    return {
        f"{entry.kind}_steps": 1, "tokens": entry.tokens, **asdict(entry.bytes),
        "flops_units": units, "flops_rest": rest, "queue_s": entry.queue_s, "compute_s": entry.compute_s,
    }  # fmt: skip


def _entry(row: sa.RowMapping) -> LedgerEntry:
    plain = {f.name: row[f.name] for f in fields(LedgerEntry) if f.name != "bytes"}
    return LedgerEntry(bytes=StepBytes(**{name: row[name] for name in BYTE_COLUMNS}), **plain)


def _usage(row: sa.RowMapping) -> RunUsage:
    counts = ("forward_steps", "backward_steps", "tokens", "reexecuted_steps")
    return RunUsage(
        run=row["run"],
        bytes=StepBytes(**{name: int(row[name]) for name in BYTE_COLUMNS}),
        flops=int(row["flops_units"]) * FLOPS_UNIT + int(row["flops_rest"]),
        queue_s=float(row["queue_s"]),
        compute_s=float(row["compute_s"]),
        **{name: int(row[name]) for name in counts},
    )
