"""The ledger's storage: its two tables, how it is opened, and whether it is still the one that was opened.

`steps` has a row per billed step, `runs` their sums: what a tenant has used is answered from the sums, so
that no question scans the steps under the lock that billing needs.
"""

import logging
import os
import sqlite3
from dataclasses import fields
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from tightbeam.common.accounts.rows import StepBytes
from tightbeam.common.errors import CloudUnavailableError, LedgerError, TightbeamError, UsageError

__all__ = ["BYTE_COLUMNS", "FLOPS_UNIT", "RUNS", "STEPS", "SUMS", "Store", "sums_of_steps"]

_log = logging.getLogger(__name__)

BYTE_COLUMNS: Final = tuple(f.name for f in fields(StepBytes))
# FLOPs of a long run pass 2^63; SQL sums quotient and remainder, Python joins them exactly.
FLOPS_UNIT: Final = 1 << 20
SUMS: Final = (
    "forward_steps", "backward_steps", "tokens", *BYTE_COLUMNS, "flops_units", "flops_rest", "queue_s",
    "compute_s", "reexecuted_steps",
)  # fmt: skip
_FIXED_WAL_VERSION: Final = (3, 51, 3)
# SQLite's codes for what the operator can mend while the cloud runs; all others stay
_PASSING: Final = ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_NOMEM")
_NAME_LENGTH: Final = 256  # as the handshake allows

# pages of names need one order everywhere: that of their bytes, which is SQLite's
_NAME: Final = sa.String(_NAME_LENGTH).with_variant(sa.String(_NAME_LENGTH, collation="C"), "postgresql")

_metadata = sa.MetaData()
STEPS: Final = sa.Table(
    "steps",
    _metadata,
    sa.Column("tenant", _NAME, primary_key=True),
    sa.Column("run", _NAME, primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("request_sha256", sa.String(64), nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("segments", sa.BigInteger, nullable=False),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in BYTE_COLUMNS),
    sa.Column("flops", sa.BigInteger, nullable=False),
    sa.Column("queue_s", sa.Double, nullable=False),
    sa.Column("compute_s", sa.Double, nullable=False),
    sa.Column("retention", sa.String(16), nullable=False),
    sa.Column("reexecuted", sa.BigInteger, nullable=False),
    sa.Column("recorded_unix_s", sa.Double, nullable=False),
)
RUNS: Final = sa.Table(
    "runs",
    _metadata,
    sa.Column("tenant", _NAME, primary_key=True),
    sa.Column("run", _NAME, primary_key=True),
    *(sa.Column(name, sa.Double if name.endswith("_s") else sa.BigInteger, nullable=False) for name in SUMS),
)


class Store:
    """The database at a file path or SQLAlchemy URL, by one connection that one thread uses at a time.

    Raises:
        UsageError: it cannot be opened, is damaged, or is something else than a ledger.

    """

    def __init__(self, url_or_path: str | Path) -> None:
        url = _url(str(url_or_path))
        self.name = url.render_as_string(hide_password=True)
        self._broken: LedgerError | None = None
        try:
            self._engine = _engine(url)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise UsageError(
                f"The ledger {self.name} needs a database driver that is not installed: {error}.",
                cure='For PostgreSQL: `pip install -e ".[postgres]"` in a checkout.',
            ) from error
        try:
            self.connection = self._engine.connect()
            self._require_ledger()
            _metadata.create_all(self.connection)
            self._sum_up_older_steps()
            self.connection.commit()
        except DBAPIError as error:
            self._engine.dispose()
            raise UsageError(
                f"The ledger {self.name} cannot be opened: {_said(error)}.", cure=_cure(error)
            ) from error
        except UsageError:
            self.close()
            raise
        self._files = _identities(url)

    def require_whole(self) -> None:
        """Raise `LedgerError` once the ledger is known to be damaged, removed or replaced."""
        if self._broken is None and any(_identity(path) != was for path, was in self._files.items()):
            self._broken = _broken("it was removed or replaced while the cloud ran")
        if self._broken is not None:
            raise self._broken

    def trouble(self, error: DBAPIError) -> TightbeamError:
        """What a failed statement means for a step: transient, or `LedgerError` from now on."""
        code = getattr(error.orig, "sqlite_errorname", "")
        if isinstance(error, OperationalError) and (not code or code.startswith(_PASSING)):
            return CloudUnavailableError(
                f"The cloud cannot write its ledger: {_said(error)}.",
                cure="Nothing was billed. Ask the operator to check the ledger's disk or database.",
            )
        self._broken = _broken(_said(error))
        return self._broken

    def close(self) -> None:
        """Release it; for SQLite this also folds the WAL into the file."""
        self.connection.close()
        self._engine.dispose()

    def _require_ledger(self) -> None:
        found = sa.inspect(self.connection)
        if self._engine.dialect.name == "sqlite":
            (health,) = self.connection.exec_driver_sql("PRAGMA quick_check(1)").scalars()
            if health != "ok":
                raise UsageError(
                    f"The ledger {self.name} is damaged: {health.splitlines()[-1]}.", cure=_RESTORE
                )
            if (tables := set(found.get_table_names())) and STEPS.name not in tables:
                raise UsageError(f"{self.name} is another program's database, not a ledger.", cure=_RESTORE)
        for table in (STEPS, RUNS):
            if not found.has_table(table.name):
                continue
            if {column["name"] for column in found.get_columns(table.name)} != set(table.columns.keys()):
                raise UsageError(
                    f"The table {table.name} in {self.name} is not one of a ledger of this version.",
                    cure=_RESTORE,
                )

    def _sum_up_older_steps(self) -> None:
        """Ledgers of before `runs` was kept have steps only; sum them up once."""
        if self.connection.execute(sa.select(RUNS.c.run).limit(1)).first() is None:
            self.connection.execute(RUNS.insert().from_select(["tenant", "run", *SUMS], sums_of_steps()))


def sums_of_steps() -> sa.Select[tuple[object, ...]]:
    """What `runs` must hold, from a scan of all steps."""
    steps = STEPS.c
    terms: dict[str, sa.ColumnElement[object]] = {name: steps[name] for name in SUMS if name in steps}
    for kind in ("forward", "backward"):
        terms[f"{kind}_steps"] = sa.case((steps.kind == kind, 1), else_=0)
    terms |= {"flops_units": steps.flops // FLOPS_UNIT, "flops_rest": steps.flops % FLOPS_UNIT}
    terms["reexecuted_steps"] = steps.reexecuted
    return sa.select(
        steps.tenant, steps.run, *(sa.func.sum(terms[name]).label(name) for name in SUMS)
    ).group_by(steps.tenant, steps.run)


_RESTORE = "Restore the ledger from a backup, or give --ledger another file."


def _broken(why: str) -> LedgerError:
    return LedgerError(
        f"The cloud has lost its ledger: {why}.",
        cure="Nothing was billed. Ask the operator to restore it and start anew.",
    )


def _said(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split()).rstrip(".")


def _cure(error: DBAPIError) -> str:
    if getattr(error.orig, "sqlite_errorname", "") in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return _RESTORE
    return "Check that its folder can be written and that no other process has it open."


def _url(text: str) -> sa.URL:
    if "://" not in text:
        return sa.URL.create("sqlite", database=text)
    try:
        url = sa.make_url(text)
    except ArgumentError as error:
        raise UsageError(
            "The ledger's address is no SQLAlchemy URL.",
            cure="Write postgresql://USER:PASSWORD@HOST/DATABASE.",
        ) from error
    # the driver that the extra "postgres" installs, not SQLAlchemy's default
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


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


def _identities(url: sa.URL) -> dict[str, tuple[int, int] | None]:
    """What the names of a SQLite ledger's files stand for now; nothing for a database behind a server."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return {}
    path = os.path.abspath(url.database)
    return {name: _identity(name) for name in (path, f"{path}-wal")}


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
