"""`tightbeam cache info|verify|clear`: what is there, what is damaged, and away with it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.caches import SCOPE, SECRET, digest, filled, opened, payload
from tightbeam.cli.app import app
from tightbeam.common.errors import IdentityError, UsageError
from tightbeam.common.identity.identities import init_certificates, load_identity
from tightbeam.edge.cache import clear_cache, identity_secret, inspect_cache, verify_cache
from tightbeam.edge.cache.store import shard_paths


def test_info_counts_entries_by_scope_without_a_key(tmp_path: Path) -> None:
    filled(tmp_path, 5, shard_bytes=1500)
    info = inspect_cache(tmp_path)
    (scope,) = info.scopes
    assert scope.num_entries == 5
    assert scope.num_bytes == sum(path.stat().st_size for path in shard_paths(tmp_path))
    assert scope.scope["fingerprint"] == SCOPE.fingerprint
    assert info.problems == []
    assert "5 entries" in info.render()
    assert "cut 2:2" in info.render()


def test_info_names_a_damaged_shard(tmp_path: Path) -> None:
    filled(tmp_path)
    (shard,) = shard_paths(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-1])
    info = inspect_cache(tmp_path)
    assert info.scopes == []
    assert shard.name in info.render()


def test_verify_opens_every_entry(tmp_path: Path) -> None:
    filled(tmp_path, 6, shard_bytes=1500)
    assert verify_cache(tmp_path, SECRET) == (6, [])
    shard = shard_paths(tmp_path)[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 128
    shard.write_bytes(raw)
    good, problems = verify_cache(tmp_path, SECRET)
    assert (good, len(problems)) == (5, 1)
    assert shard.name in problems[0]
    with pytest.raises(IdentityError):
        verify_cache(tmp_path, bytes(32))


def test_clear_removes_what_the_cache_made_and_nothing_else(tmp_path: Path) -> None:
    with opened(tmp_path, secret=None) as cache:
        cache.put(digest(0), payload(0))
        with pytest.raises(UsageError, match="in use"):
            clear_cache(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert clear_cache(tmp_path) > 400
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="no activation cache"):
        clear_cache(tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_the_commands(tmp_path: Path) -> None:
    init_certificates(tmp_path / "certs", clients=["edge", "other"])
    folder, run = tmp_path / "cache", CliRunner().invoke
    secret = identity_secret(load_identity(tmp_path / "certs" / "edge"))
    with opened(folder, secret=secret) as cache:
        cache.put(digest(0), payload(0))
    assert "1 entries" in run(app, ["cache", "info", str(folder)]).stdout
    mine = run(app, ["cache", "verify", str(folder), "--identity", str(tmp_path / "certs" / "edge")])
    assert (mine.exit_code, mine.stdout) == (0, "1 samples are intact, 0 problems\n")
    theirs = run(app, ["cache", "verify", str(folder), "--identity", str(tmp_path / "certs" / "other")])
    assert isinstance(theirs.exception, IdentityError)
    (shard,) = shard_paths(folder)
    shard.write_bytes(shard.read_bytes()[:-1])
    broken = run(app, ["cache", "verify", str(folder), "--identity", str(tmp_path / "certs" / "edge")])
    assert broken.exit_code == 1
    assert shard.name in broken.stderr
    assert "MB freed" in run(app, ["cache", "clear", str(folder)]).stdout
    assert not shard_paths(folder)
