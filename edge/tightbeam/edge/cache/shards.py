"""A shard: many sealed activations in one safetensors file, written once, whole, and read by memory map.

Every entry is a uint8 tensor: AES-256-GCM over one sample's coded activation. The shard's key is its own,
and the nonce is the first 12 bytes of the entry's name: names are outputs of a keyed hash and none occurs
twice in a shard, so no nonce does. The associated data binds scope and name, so an entry moved elsewhere does
not open. The metadata carries an HMAC over itself and over the list of entries, so that a foreign, edited or
shortened shard is told when it is opened, before anything is read from it.
"""

import hashlib
import hmac
import json
import mmap
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.numpy import save

from tightbeam.common.errors import IntegrityError
from tightbeam.common.files import atomic_write
from tightbeam.edge.cache.keys import CacheKeys, Scope

__all__ = ["OVERHEAD_BYTES", "SUFFIX", "OpenShard", "Shard", "read_header"]

SUFFIX = ".safetensors"
OVERHEAD_BYTES = 16 + 110  # tag, and an entry's line in the header
_METADATA_BYTES = 1500
_FORMAT = "tightbeam.cache/1"
_NONCE_BYTES = 12


def _context(scope_sha256: str, name: str) -> bytes:
    return bytes.fromhex(scope_sha256) + bytes.fromhex(name)


class OpenShard:
    """Entries not on disk yet. They are sealed at once and can be read."""

    def __init__(self, keys: CacheKeys, scope: Scope) -> None:
        self._scope, self._id = scope, secrets.token_bytes(32)
        self._key = keys.shard_key(self._id)
        self._cipher = AESGCM(self._key)
        self._sealed: dict[str, bytes] = {}
        self._entry_bytes = 0

    def __len__(self) -> int:
        return len(self._sealed)

    def __contains__(self, name: str) -> bool:
        return name in self._sealed

    @property
    def num_bytes(self) -> int:
        """At most so large a file it becomes."""
        return self._entry_bytes + (_METADATA_BYTES if self._sealed else 0)

    def add(self, name: str, payload: bytes | memoryview) -> None:
        """Seal one entry; a name may be added once."""
        assert name not in self._sealed, "a name is a nonce"
        nonce = bytes.fromhex(name)[:_NONCE_BYTES]
        self._sealed[name] = self._cipher.encrypt(nonce, payload, _context(self._scope.sha256, name))
        self._entry_bytes += len(self._sealed[name]) + OVERHEAD_BYTES

    def read(self, name: str) -> bytes:
        """An entry's payload."""
        nonce = bytes.fromhex(name)[:_NONCE_BYTES]
        return self._cipher.decrypt(nonce, self._sealed[name], _context(self._scope.sha256, name))

    def write(self, folder: Path) -> Path:
        """Put the shard on disk, whole or not at all; `TightbeamError` when it cannot be written."""
        facts = {
            "format": _FORMAT,
            "shard_id": self._id.hex(),
            "scope_sha256": self._scope.sha256,
            "scope": json.dumps(asdict(self._scope), sort_keys=True),
        }
        lengths = {name: len(sealed) for name, sealed in self._sealed.items()}
        facts["mac"] = _mac(self._key, facts, lengths)
        tensors = {name: np.frombuffer(sealed, np.uint8) for name, sealed in self._sealed.items()}
        path = folder / f"{self._id.hex()[:16]}{SUFFIX}"
        atomic_write(path, save(tensors, metadata=facts))
        return path


class Shard:
    """A shard on disk, checked and mapped into memory."""

    def __init__(self, path: Path, keys: CacheKeys) -> None:
        """Raises `IntegrityError`, with the reason, for a file that is not an intact shard of these keys."""
        self.path = path
        self.facts, self._places, self.num_bytes = read_header(path)
        key = keys.shard_key(_hex(path, self.facts.get("shard_id")))
        lengths = {name: stop - start for name, (start, stop) in self._places.items()}
        rest = {name: value for name, value in self.facts.items() if name != "mac"}
        if not hmac.compare_digest(_mac(key, rest, lengths), str(self.facts.get("mac"))):
            raise IntegrityError(f"{path.name} was sealed with another key, or its header was changed.")
        self.scope_sha256: str = self.facts["scope_sha256"]
        self._cipher = AESGCM(key)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def scope(self) -> Scope:
        """What its entries are of."""
        facts = json.loads(self.facts["scope"])
        return Scope(**(facts | {"taps": tuple(facts["taps"])}))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, name: str) -> bytes:
        """An entry's payload; `IntegrityError` when its bytes were changed."""
        start, stop = self._places[name]
        nonce = bytes.fromhex(name)[:_NONCE_BYTES]
        try:
            with memoryview(self._map) as whole, whole[start:stop] as sealed:
                return self._cipher.decrypt(nonce, sealed, _context(self.scope_sha256, name))
        except InvalidTag:
            raise IntegrityError(f"The entry {name} of {self.path.name} was changed.") from None

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, int]], int]:
    """Metadata, each entry's first and last byte in the file, and the file's size; no key is needed.

    Raises `IntegrityError`: truncated, or no shard at all.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise IntegrityError(f"{path.name} is truncated or no shard.")
            header: dict[str, Any] = json.loads(file.read(length))
        facts = header.pop("__metadata__", {})
        places = {
            name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise IntegrityError(f"{path.name} cannot be read: {error}.") from error
    if facts.get("format") != _FORMAT or not places:
        raise IntegrityError(f"{path.name} is no shard of this version.")
    if max(stop for _, stop in places.values()) != size:
        raise IntegrityError(f"{path.name} is truncated: {size} bytes.")
    return facts, places, size


def _mac(key: bytes, facts: dict[str, str], lengths: dict[str, int]) -> str:
    content = json.dumps([facts, lengths], sort_keys=True).encode()
    # The same key seals entries; the hash separates the two uses.
    return hmac.new(hashlib.sha256(b"header" + key).digest(), content, "sha256").hexdigest()


def _hex(path: Path, value: str | None) -> bytes:
    try:
        return bytes.fromhex(value or "")
    except ValueError:
        raise IntegrityError(f"{path.name} has a malformed id.") from None
