"""What an entry of the activation cache is called, and which keys seal it.

    secret     the edge identity's signing key, or 32 random bytes in a file for an edge without identity
    master     HKDF(secret, salt of the folder, "master")
    name       HMAC(HKDF(master, "names"), scope, SHA-256 over token ids and positions), 16 bytes
    shard key  HKDF(master, id of the shard, "shard"), used for one shard only

A bare hash of a text would let anybody who guesses the text find it in the folder; the HMAC does not. The
scope is everything besides the sample that decides an activation, so that a change of any of it is a miss.
"""

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tightbeam.common.identity.identities import Identity

__all__ = ["NAME_BYTES", "CacheKeys", "Scope", "identity_secret", "sample_digest"]

NAME_BYTES = 16
_LABEL = b"tightbeam activation cache 1 "


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """What besides the sample decides the activation after the trunk."""

    fingerprint: str  # of the backbone
    trunk_dtype: str  # in which the cloud computes it
    cut: str
    bottom_sha256: str  # of a frozen adapter's tensors below the cut; "" without one
    codec_up: str
    codec_down: str
    dtype: str  # of the edge's blocks
    hidden_size: int
    taps: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hex digest over all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def sample_digest(input_ids: Sequence[int], positions: Sequence[int]) -> bytes:
    """SHA-256 over the tokens of one sample and where they stand."""
    both = np.array([input_ids, positions], dtype="<i8")
    return hashlib.sha256(len(input_ids).to_bytes(8) + both.tobytes()).digest()


def identity_secret(identity: Identity) -> bytes:
    """What an identity's cache is sealed with; only a holder of its private key can tell."""
    return identity.signing_key.private_bytes_raw()


class CacheKeys:
    """The keys of one cache folder."""

    def __init__(self, secret: bytes, salt: bytes) -> None:
        self._master = _derive(secret, salt, b"master")
        self._names = _derive(self._master, b"", b"names")

    def check_value(self) -> str:
        """Tells, without giving anything away, whether a folder was sealed with the same secret."""
        return _derive(self._master, b"", b"check").hex()

    def name(self, scope: Scope, digest: bytes) -> str:
        """Hex name of a sample's entry."""
        content = bytes.fromhex(scope.sha256) + digest
        return hmac.digest(self._names, content, "sha256")[:NAME_BYTES].hex()

    def shard_key(self, shard_id: bytes) -> bytes:
        """The AES-256 key of one shard."""
        return _derive(self._master, shard_id, b"shard")


def _derive(secret: bytes, salt: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, _LABEL + purpose).derive(secret)
