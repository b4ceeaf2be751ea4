"""The activation cache: what the trunk answered for each sample, sealed in a folder of this edge.

    cache.json            salt, and how the folder is sealed
    key                   only for an edge without identity: the secret itself
    lock                  held by the one process that uses the folder
    <id>.safetensors      shards, see `shards.py`

Shards are only ever added, whole. A kill loses at most the open one, whose samples are fetched again. A shard
that is damaged or foreign is named and left unread. A full cache stops adding and says so once; what it does
not hold goes through the cloud in every epoch.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from tightbeam.common.errors import IdentityError, IntegrityError, TightbeamError, UsageError
from tightbeam.common.files import atomic_write, write_failed
from tightbeam.common.locks import FolderLock
from tightbeam.edge.cache.keys import CacheKeys, Scope
from tightbeam.edge.cache.shards import OVERHEAD_BYTES, SUFFIX, OpenShard, Shard

__all__ = ["ActivationCache", "lock_cache", "open_keys", "read_facts", "shard_paths"]

_SHARD_BYTES = 64 * 2**20
_RESERVE_BYTES = 4096  # cache.json, key, and the header of a shard just begun
_FORMAT = "tightbeam.cache/1"


class ActivationCache:
    """The entries of one scope. Not thread-safe: the training thread owns it.

    Args:
        folder: Made when absent.
        scope: What besides the sample decides an activation.
        secret: Of the edge's identity; None takes (and makes) the folder's own key file.
        max_bytes: Most that all shards of the folder may take, those of other scopes included.
        warn: Gets a line for everything that is damaged, foreign or full.
        shard_bytes: An open shard of this size is written.

    Raises:
        IdentityError: The folder is sealed with another identity.
        UsageError: Another process uses it, or it is no cache.
        TightbeamError: It cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        scope: Scope,
        *,
        secret: bytes | None,
        max_bytes: int,
        warn: Callable[[str], None],
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self.folder, self.scope = Path(folder), scope
        self._max_bytes, self._warn, self._shard_bytes = max_bytes, warn, shard_bytes
        try:
            self._lock = lock_cache(self.folder)
        except OSError as error:
            raise write_failed(self.folder, error) from error
        self._full = self._disk_failed = False
        self._shards: list[Shard] = []
        self._where: dict[str, list[Shard]] = {}
        try:
            self._keys = open_keys(self.folder, secret, create=True)
            self._open = OpenShard(self._keys, scope)
            self._disk_bytes = sum(map(self._admit, shard_paths(self.folder)))
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Samples held."""
        return len(self._where) + len(self._open)

    def __contains__(self, digest: bytes) -> bool:
        name = self._keys.name(self.scope, digest)
        return name in self._where or name in self._open

    @property
    def num_bytes(self) -> int:
        """Bytes on disk and in the open shard, all scopes."""
        return self._disk_bytes + self._open.num_bytes

    @property
    def full(self) -> bool:
        """Whether it has stopped adding."""
        return self._full

    def has_room(self, num_bytes: int, num_entries: int) -> bool:
        """Whether so many more payloads of so many bytes in all fit, whatever shards they fall into."""
        size = num_bytes + num_entries * OVERHEAD_BYTES
        return not self._full and self.num_bytes + 1.01 * size <= self._max_bytes - _RESERVE_BYTES

    def get(self, digest: bytes) -> bytes | None:
        """A sample's payload; None when it is not held, or no longer as it was written."""
        name = self._keys.name(self.scope, digest)
        if name in self._open:
            return self._open.read(name)
        while (shards := self._where.get(name)) is not None:
            try:
                return shards[-1].read(name)
            except IntegrityError as error:
                self._forget(name)
                self._warn(f"{error.message} Its sample is fetched again.")
        return None

    def discard(self, digest: bytes) -> bool:
        """Leave an entry that makes no sense unread from now on; False for one that is not on disk yet."""
        name = self._keys.name(self.scope, digest)
        if name in self._open:
            return False
        self._forget(name)
        self._warn(f"Cache {self.folder}: the entry {name} is damaged. Its sample is fetched again.")
        return True

    def put_all(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep the payloads of samples that crossed together; what a kill takes of them, it takes of all."""
        for digest, payload in entries:
            self._add(digest, payload)
        self._commit_full_shard()

    def put(self, digest: bytes, payload: bytes | memoryview) -> bool:
        """Keep a sample's payload; False when the cache is full. One that is held already stays as it is."""
        kept = self._add(digest, payload)
        self._commit_full_shard()
        return kept

    def _commit_full_shard(self) -> None:
        if self._open.num_bytes >= self._shard_bytes:
            self.commit()

    def _add(self, digest: bytes, payload: bytes | memoryview) -> bool:
        name = self._keys.name(self.scope, digest)
        if name in self._where or name in self._open:
            return True
        if self._full:
            return False
        if self.num_bytes + len(payload) + OVERHEAD_BYTES > self._max_bytes - _RESERVE_BYTES:
            self._stop(f"The cache {self.folder} is full at {self._max_bytes / 1e6:.0f} MB.")
            return False
        self._open.add(name, payload)
        return True

    def commit(self) -> None:
        """Write the open shard: what was put before survives a kill from now on."""
        if not len(self._open) or self._disk_failed:
            return
        try:
            path = self._open.write(self.folder)
        except TightbeamError as error:
            self._disk_failed = True  # the entries stay readable; more of them would only fill the memory
            self._stop(error.message)
            return
        self._disk_bytes += self._admit(path)
        self._open = OpenShard(self._keys, self.scope)

    def close(self) -> None:
        """Write what is open and let others use the folder."""
        self.commit()
        self._release()

    def _release(self) -> None:
        for shard in self._shards:
            shard.close()
        self._shards, self._where = [], {}
        self._lock.release()

    def _admit(self, path: Path) -> int:
        """Take a shard into the index if it is intact and of this scope; gives its size."""
        size = path.stat().st_size
        try:
            shard = Shard(path, self._keys)
        except IntegrityError as error:
            self._warn(f"Cache {self.folder}: {error.message} Its samples are fetched again.")
            return size
        if shard.scope_sha256 != self.scope.sha256:
            shard.close()
            return size
        self._shards.append(shard)
        for name in shard:
            self._where.setdefault(name, []).append(shard)  # one that was damaged may have been fetched again
        return size

    def _forget(self, name: str) -> None:
        self._where[name].pop()
        if not self._where[name]:
            del self._where[name]

    def _stop(self, why: str) -> None:
        if not self._full:
            self._warn(f"{why} Samples that it does not hold go through the cloud in every epoch.")
        self._full = True


def shard_paths(folder: Path) -> list[Path]:
    """Shards of a folder, in a fixed order."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def lock_cache(folder: Path) -> FolderLock:
    """The lock of a cache's folder; raises `UsageError` when another process has it."""
    cure = "Wait until it ends, or give this run its own cache.dir."
    return FolderLock(folder, what=f"The cache {folder}", cure=cure)


def read_facts(folder: Path) -> dict[str, Any]:
    """What cache.json says.

    Raises:
        UsageError: The folder is no cache.
    """
    try:
        facts = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        if facts["format"] == _FORMAT and {"salt", "check", "sealed_by"} <= facts.keys():
            return dict(facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UsageError(
        f"{folder} is no activation cache of this version.",
        cure="Give the folder that cache.dir names, or runs/NAME/cache.",
    )


def open_keys(folder: Path, secret: bytes | None, *, create: bool = False) -> CacheKeys:
    """The keys of a folder; a fresh one is set up when `create` is on.

    Raises:
        IdentityError: It is sealed otherwise.
        UsageError: It is no cache.
    """
    if create and not (folder / "cache.json").exists():
        if any(_foreign(folder)):
            raise UsageError(
                f"{folder} holds other files and no cache.",
                cure="Give cache.dir an empty folder or a new one.",
            )
        _set_up(folder, secret)
    facts = read_facts(folder)
    by_file = facts["sealed_by"] == "key file"
    if by_file != (secret is None):
        raise IdentityError(
            f"The cache {folder} is sealed with {'its own key file' if by_file else 'an identity'}, "
            f"this edge has {'an' if by_file else 'no'} identity.",
            cure=f"Use another cache.dir, or `tightbeam cache clear {folder}`.",
        )
    try:
        keys = CacheKeys(secret or (folder / "key").read_bytes(), bytes.fromhex(facts["salt"]))
    except OSError as error:
        raise IdentityError(
            f"The key of the cache {folder} cannot be read.", cure=f"`tightbeam cache clear {folder}`."
        ) from error
    if keys.check_value() != facts["check"]:
        raise IdentityError(
            f"The cache {folder} is sealed with another {'key' if by_file else 'identity'}.",
            cure=f"Use the one it was made with, another cache.dir, or `tightbeam cache clear {folder}`.",
        )
    return keys


def _set_up(folder: Path, secret: bytes | None) -> None:
    salt = secrets.token_bytes(32)
    if secret is None:
        key = secrets.token_bytes(32)
        handle = os.open(folder / "key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(key)
            os.fsync(file.fileno())
    facts = {
        "format": _FORMAT,
        "salt": salt.hex(),
        "sealed_by": "key file" if secret is None else "identity",
        "check": CacheKeys(key if secret is None else secret, salt).check_value(),
    }
    atomic_write(folder / "cache.json", json.dumps(facts, indent=2) + "\n")


def _foreign(folder: Path) -> Iterator[Path]:
    """Files that a cache being set up does not leave behind."""
    return (path for path in folder.iterdir() if path.name not in ("key", "lock") and path.suffix != ".tmp")
