"""A real PostgreSQL for tests: its own server in a temporary folder, reached by a socket there."""

import atexit
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

__all__ = ["postgres_url"]


@functools.cache
def postgres_url() -> str:
    """Where a server listens that lives as long as this process; skips where it cannot be had."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("PostgreSQL goes untested: psycopg is not installed")
    programs = shutil.which("initdb") or max(
        map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=""
    )
    if not programs:
        pytest.skip("PostgreSQL goes untested: no initdb on this machine")
    folder = Path(tempfile.mkdtemp(prefix="tightbeam-pg-"))  # short: a socket's path has 107 bytes
    user = None
    if os.name == "posix" and os.geteuid() == 0:  # the server refuses to run as root
        user = "postgres"
        shutil.chown(folder, user)

    def run(program: str, *arguments: str) -> None:
        command = [str(Path(programs).with_name(program)), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60)

    def stop() -> None:
        run("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(folder, ignore_errors=True)

    run("initdb", "-U", "postgres", "-A", "trust", "--no-sync")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    run("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", options)
    atexit.register(stop)
    return f"postgresql://postgres@/postgres?host={folder}"
