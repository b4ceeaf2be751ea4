"""The cache keeps what it was given, sealed, through kills, damage, strangers and full disks."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load, save

from support.caches import SCOPE, digest, filled, opened, payload
from tightbeam.common.errors import IdentityError, UsageError
from tightbeam.edge.cache import Scope, sample_digest
from tightbeam.edge.cache.store import shard_paths


def test_what_is_put_is_got_before_and_after_it_is_on_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        assert cache.get(digest(1)) is None
        assert digest(1) not in cache
        cache.put(digest(1), payload(1))
        assert cache.get(digest(1)) == payload(1)
        cache.commit()
        assert cache.get(digest(1)) == payload(1)
        cache.put(digest(2), payload(2))
        assert len(cache) == 2
    with opened(tmp_path) as again:
        assert [again.get(digest(n)) for n in (1, 2, 3)] == [payload(1), payload(2), None]
        assert digest(2) in again


def test_an_entry_is_written_once(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    before = {path: path.read_bytes() for path in shard_paths(tmp_path)}
    with opened(tmp_path) as cache:
        assert cache.put(digest(1), b"something else")
        assert cache.get(digest(1)) == payload(1)
    assert {path: path.read_bytes() for path in shard_paths(tmp_path)} == before


def test_tokens_and_positions_make_the_key() -> None:
    assert sample_digest([1, 2], [0, 1]) == sample_digest([1, 2], [0, 1])
    others = [
        sample_digest([1, 3], [0, 1]),
        sample_digest([1, 2], [1, 2]),
        sample_digest([1], [0]),
        sample_digest([1, 2, 0], [0, 1, 2]),
    ]
    assert len({sample_digest([1, 2], [0, 1]), *others}) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", "cd" * 32), ("cut", "2:3"), ("bottom_sha256", "ee" * 32), ("codec_up", "int8"),
        ("codec_down", "int8"), ("dtype", "bfloat16"), ("trunk_dtype", "bfloat16"), ("taps", ("4",)),
    ],
)  # fmt: skip
def test_another_scope_never_sees_the_entries(tmp_path: Path, field: str, value: object) -> None:
    filled(tmp_path)
    fields = {name: getattr(SCOPE, name) for name in Scope.__dataclass_fields__} | {field: value}
    with opened(tmp_path, scope=Scope(**fields)) as cache:
        assert [cache.get(digest(n)) for n in range(6)] == [None] * 6
        assert len(cache) == 0
    with opened(tmp_path) as cache:
        assert len(cache) == 6


def test_nothing_on_disk_is_readable_or_guessable(tmp_path: Path) -> None:
    filled(tmp_path)
    (shard,) = shard_paths(tmp_path)
    raw = shard.read_bytes()
    assert payload(3)[:16] not in raw
    assert digest(3).hex()[:32].encode() not in raw  # a bare hash would confirm a guessed text
    tensors = load(raw)
    assert len(tensors) == 6
    assert all(len(values) == 400 + 16 for values in tensors.values())


def test_two_folders_seal_the_same_sample_differently(tmp_path: Path) -> None:
    for name in ("a", "b"):
        filled(tmp_path / name, 1)
    left, right = (load(shard_paths(tmp_path / name)[0].read_bytes()) for name in ("a", "b"))
    assert left.keys() != right.keys()


def test_one_flipped_bit_is_named_and_its_sample_missing(tmp_path: Path) -> None:
    filled(tmp_path)
    (shard,) = shard_paths(tmp_path)
    raw = bytearray(shard.read_bytes())
    raw[-100] ^= 1
    shard.write_bytes(raw)
    warnings: list[str] = []
    with opened(tmp_path, warnings) as cache:
        got = [cache.get(digest(n)) for n in range(6)]
        assert got.count(None) == 1
        assert all(value in (None, payload(n)) for n, value in enumerate(got))
        assert len(warnings) == 1
        assert shard.name in warnings[0]
        lost = got.index(None)
        assert cache.put(digest(lost), payload(lost))
    with opened(tmp_path, warnings) as cache:  # the damaged entry may be met again first
        assert [cache.get(digest(n)) for n in range(6)] == [payload(n) for n in range(6)]


@pytest.mark.parametrize("keep", [0, 5, 200, 900, -1])
def test_a_truncated_shard_is_named_and_left_unread(tmp_path: Path, keep: int) -> None:
    filled(tmp_path)
    (shard,) = shard_paths(tmp_path)
    shard.write_bytes(shard.read_bytes()[:keep])
    warnings: list[str] = []
    with opened(tmp_path, warnings) as cache:
        assert len(cache) == 0
    assert len(warnings) == 1
    assert shard.name in warnings[0]
    assert "fetched again" in warnings[0]


def test_a_shard_of_another_cache_is_named_and_left_unread(tmp_path: Path) -> None:
    filled(tmp_path / "ours", 2)
    filled(tmp_path / "theirs", 3)
    (stranger,) = shard_paths(tmp_path / "theirs")
    (tmp_path / "ours" / stranger.name).write_bytes(stranger.read_bytes())
    warnings: list[str] = []
    with opened(tmp_path / "ours", warnings) as cache:
        assert len(cache) == 2
    assert len(warnings) == 1
    assert stranger.name in warnings[0]
    assert "another key" in warnings[0]


def test_an_edited_header_is_named(tmp_path: Path) -> None:
    other = Scope(**{name: getattr(SCOPE, name) for name in Scope.__dataclass_fields__} | {"cut": "3:3"})
    filled(tmp_path)
    (shard,) = shard_paths(tmp_path)
    raw = shard.read_bytes()
    forged = raw.replace(SCOPE.sha256.encode(), other.sha256.encode())
    assert forged != raw
    shard.write_bytes(forged)
    warnings: list[str] = []
    with opened(tmp_path, warnings, scope=other) as cache:
        assert len(cache) == 0
    assert len(warnings) == 1


def test_a_removed_entry_is_noticed(tmp_path: Path) -> None:
    filled(tmp_path)
    (shard,) = shard_paths(tmp_path)
    from tightbeam.edge.cache.shards import read_header

    facts, _, _ = read_header(shard)
    tensors = load(shard.read_bytes())
    tensors.popitem()
    shard.write_bytes(save(tensors, metadata=facts))
    warnings: list[str] = []
    with opened(tmp_path, warnings) as cache:
        assert len(cache) == 0
    assert len(warnings) == 1


def test_another_identity_is_refused_with_a_cure(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(IdentityError, match=r"another identity.*cache clear"):
        opened(tmp_path, secret=bytes(32))
    with pytest.raises(IdentityError, match="sealed with an identity"):
        opened(tmp_path, secret=None)
    with opened(tmp_path) as cache:  # and the refusal let go of the lock
        assert len(cache) == 6


def test_an_edge_without_identity_keeps_its_own_key_file(tmp_path: Path) -> None:
    with opened(tmp_path, secret=None) as cache:
        cache.put(digest(0), payload(0))
    if sys.platform != "win32":
        assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    with opened(tmp_path, secret=None) as cache:
        assert cache.get(digest(0)) == payload(0)
    with pytest.raises(IdentityError, match="its own key file"):
        opened(tmp_path)
    (tmp_path / "key").write_bytes(bytes(32))
    with pytest.raises(IdentityError, match="another key"):
        opened(tmp_path, secret=None)
    (tmp_path / "key").unlink()
    with pytest.raises(IdentityError, match="cannot be read"):
        opened(tmp_path, secret=None)


def test_a_folder_with_other_files_is_not_made_a_cache(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="other files"):
        opened(tmp_path)


def test_what_is_put_together_is_written_together(tmp_path: Path) -> None:
    """A kill in between leaves all of it or nothing, though a shard is full with half of it."""
    with opened(tmp_path, shard_bytes=1000) as cache:
        cache.put_all((digest(n), payload(n)) for n in range(4))
        assert len(shard_paths(tmp_path)) == 1
    with opened(tmp_path) as again:
        assert len(again) == 4
    (tmp_path / "alone").mkdir()
    with opened(tmp_path / "alone", shard_bytes=1000) as cache:
        for n in range(4):
            cache.put(digest(n), payload(n))
        assert len(shard_paths(tmp_path / "alone")) > 1


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(UsageError, match="in use by process"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_full_cache_says_so_once_and_keeps_its_bound(tmp_path: Path) -> None:
    warnings: list[str] = []
    with opened(tmp_path, warnings, max_bytes=20_000, shard_bytes=4_000) as cache:
        kept = [cache.put(digest(n), payload(n)) for n in range(100)]
        assert cache.full
        assert 15 < sum(kept) < 50
        assert kept == sorted(kept, reverse=True)  # it stops, it does not pick
        assert cache.put(digest(0), payload(0))  # what is held stays held
    assert len(warnings) == 1
    assert "full at 0 MB" in warnings[0]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 10_000 < size <= 20_000
    with opened(tmp_path) as cache:
        assert len(cache) == sum(kept)


def test_a_full_disk_is_named_and_what_was_committed_stays(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    filled(tmp_path, 3)
    warnings: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path, warnings) as cache:
        for number in range(3, 40):
            cache.put(digest(number), payload(number))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            cache.commit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(warnings) == 1
        assert "No space left" in warnings[0]
        assert not cache.put(digest(90), payload(90))
        assert cache.get(digest(20)) == payload(20)  # still readable by the run that holds it
    assert not list(tmp_path.glob(".*.tmp"))
    with opened(tmp_path) as cache:
        assert [cache.get(digest(n)) for n in (0, 1, 2, 3)] == [payload(0), payload(1), payload(2), None]


_WRITER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from support.caches import digest, opened, payload
cache = opened(Path(sys.argv[1]), shard_bytes=3000)
print("ready", flush=True)
number = 0
while True:
    cache.put(digest(number), payload(number))
    number += 1
"""


def test_a_kill_at_any_moment_loses_at_most_the_open_shard(tmp_path: Path) -> None:
    counts = []
    for delay_s in (0.0, 0.03, 0.11):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), *sys.path],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
        process.wait()
        process.stdout.close()
        with opened(tmp_path) as cache:  # no warning: every shard is whole
            counts.append(len(cache))
            for number in range(len(cache)):
                assert cache.get(digest(number)) == payload(number)
            assert cache.get(digest(len(cache))) is None  # entries are lost from the end only
    assert counts == sorted(counts)
    assert counts[-1] > 0
