"""Sealed records: one AEAD ciphertext per message, in order, one key per direction.

Sans-IO: bytes in, bytes out. A record is `ciphertext || tag` and nothing else. Its number is counted by both
ends and never sent, so a record that is flipped, cut, doubled, dropped, reordered or moved from elsewhere
does not authenticate, and the first one that does not ends the session for good.

* Nonce: iv XOR record number (RFC 8446, 5.3). No key sees a number twice: the number only grows, keys belong
  to one session and one direction, and neither is ever stored.
* Key schedule: the traffic secret gives key and iv, and after 2**16 records the next secret (RFC 8446, 7.2).
  With records of at most 1 MiB that is 2**32 AES blocks a key: an attacker's advantage stays below 2**-64.
* Associated data: protocol, session, direction and number, then the caller's context. `chunk_context` binds
  a chunk to its place and, by the digest of its step's header, to step, kind, dtype, shape and codec.

docs/wire.md specifies every byte; tests/common/wire/vectors holds known answers.
"""

import hashlib
import struct
import threading
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tightbeam.common.errors import IntegrityError

__all__ = [
    "CHUNK_BYTES",
    "PROTOCOL",
    "RECORDS_PER_KEY",
    "SECRET_BYTES",
    "SESSION_ID_BYTES",
    "TAG_BYTES",
    "Aead",
    "Buffer",
    "Direction",
    "Opener",
    "Sealer",
    "TrafficKey",
    "chunk_context",
    "header_context",
    "header_digest",
    "next_secret",
    "traffic_key",
]

PROTOCOL = "tightbeam/1"
CHUNK_BYTES = 1 << 20  # the longest plaintext of one record
TAG_BYTES = 16
SESSION_ID_BYTES = 16
SECRET_BYTES = 32
RECORDS_PER_KEY = 1 << 16

_ASSOCIATED_DATA = struct.Struct(">16s16sBQI")  # protocol, session, direction, number, context length
_CHUNK_CONTEXT = struct.Struct(">B32sIII")  # 2, header digest, tensor, chunk, chunks

Buffer = bytes | bytearray | memoryview


class Direction(IntEnum):
    """Which way a record travels. The ways have unrelated keys, and the associated data names the way too."""

    EDGE_TO_CLOUD = 1
    CLOUD_TO_EDGE = 2


class Aead(Enum):
    """The ciphers that the handshake may agree on; both take a 32-byte key and a 12-byte nonce (RFC 5116)."""

    AES_256_GCM = "AES-256-GCM"
    CHACHA20_POLY1305 = "ChaCha20-Poly1305"

    def cipher(self, key: bytes) -> AESGCM | ChaCha20Poly1305:
        """Return the cipher object for one key."""
        return AESGCM(key) if self is Aead.AES_256_GCM else ChaCha20Poly1305(key)


@dataclass(frozen=True, slots=True)
class TrafficKey:
    """What seals up to 2**16 records: a 32-byte key and a 12-byte iv."""

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)


def traffic_key(secret: bytes) -> TrafficKey:
    """Derive key and iv from a traffic secret of 32 bytes."""
    return TrafficKey(_expand(secret, "key", 32), _expand(secret, "iv", 12))


def next_secret(secret: bytes) -> bytes:
    """Derive the traffic secret of the next 2**16 records; there is no way back."""
    return _expand(secret, "next", SECRET_BYTES)


def _expand(secret: bytes, label: str, length: int) -> bytes:
    return HKDFExpand(SHA256(), length, f"{PROTOCOL} {label}".encode()).derive(secret)


def header_digest(header: Buffer) -> bytes:
    """SHA-256 of a header record's plaintext, which the chunks of its step are bound to."""
    return hashlib.sha256(header).digest()


def header_context() -> bytes:
    """Context of a step's header record: a chunk can never be taken for a header."""
    return b"\x01"


def chunk_context(header_digest: bytes, tensor: int, chunk: int, chunks: int) -> bytes:
    """Context of chunk number `chunk` of `chunks` of tensor number `tensor`, all counted from 0."""
    assert len(header_digest) == 32
    assert 0 <= chunk < chunks
    return _CHUNK_CONTEXT.pack(2, header_digest, tensor, chunk, chunks)


class _Sequence:
    """The cipher, nonce and associated data of record 0, 1, 2, ... Each is given out once, whoever asks."""

    def __init__(self, secret: bytes, session_id: bytes, direction: Direction, aead: Aead) -> None:
        assert len(secret) == SECRET_BYTES
        assert len(session_id) == SESSION_ID_BYTES
        self._next_secret = secret
        self._session_id = session_id
        self._direction = direction
        self._aead = aead
        self._number = 0
        # Records of one direction must be sealed in order anyway. The lock is there because two threads with
        # the same number would give away both plaintexts and the authentication key.
        self._lock = threading.Lock()

    def take(self, context: bytes) -> tuple[AESGCM | ChaCha20Poly1305, bytes, bytes]:
        with self._lock:
            number = self._number
            self._number += 1
            if number % RECORDS_PER_KEY == 0:
                key = traffic_key(self._next_secret)
                self._next_secret = next_secret(self._next_secret)
                self._cipher = self._aead.cipher(key.key)
                self._iv = int.from_bytes(key.iv)
            cipher, iv = self._cipher, self._iv
        nonce = (iv ^ number).to_bytes(12)
        prefix = _ASSOCIATED_DATA.pack(
            PROTOCOL.encode(), self._session_id, self._direction, number, len(context)
        )
        return cipher, nonce, prefix + context


def _flat(buffer: Buffer) -> memoryview:
    """Return any contiguous buffer as bytes in the same memory: `memoryview(array)` has rows and items."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(bytearray())  # no cast over a shape with a zero


class Sealer:
    """Seals the records of one direction of one session, in order."""

    def __init__(
        self, secret: bytes, session_id: bytes, direction: Direction, aead: Aead = Aead.AES_256_GCM
    ) -> None:
        self._sequence = _Sequence(secret, session_id, direction, aead)

    def seal(self, plaintext: Buffer, context: bytes = b"") -> bytes:
        """Return `ciphertext || tag` of at most 1 MiB of plaintext, read where it lies."""
        flat = _flat(plaintext)
        assert len(flat) <= CHUNK_BYTES, "a record holds at most CHUNK_BYTES"
        cipher, nonce, associated_data = self._sequence.take(context)
        return cipher.encrypt(nonce, flat, associated_data)


class Opener:
    """Opens the records of one direction of one session, in order, until one does not authenticate."""

    def __init__(
        self, secret: bytes, session_id: bytes, direction: Direction, aead: Aead = Aead.AES_256_GCM
    ) -> None:
        self._sequence = _Sequence(secret, session_id, direction, aead)
        self._dead = False

    def open(self, record: Buffer, context: bytes = b"") -> bytes:
        """Return the plaintext of the next record.

        Raises IntegrityError if it is not the next one or not unchanged. The opener is dead from then on.
        """
        self._admit(record)
        cipher, nonce, associated_data = self._sequence.take(context)
        try:
            return cipher.decrypt(nonce, record, associated_data)
        except InvalidTag:
            raise self._die() from None

    def open_into(self, record: Buffer, context: bytes, out: memoryview) -> int:
        """Open the next record into `out` (writable, contiguous) and return the number of bytes.

        The record must fill `out` exactly: after a shorter one the rest would be whatever the memory held
        before. If it does not authenticate, `out` is zeroed: no unverified plaintext is left behind.

        Raises IntegrityError if it is not the next one or not unchanged. The opener is dead from then on.
        """
        assert not out.readonly
        target = _flat(out)
        if self._admit(record) != len(target):
            raise self._die()
        cipher, nonce, associated_data = self._sequence.take(context)
        try:
            return cipher.decrypt_into(nonce, record, associated_data, target)
        except InvalidTag:
            target[:] = bytes(len(target))
            raise self._die() from None

    def _admit(self, record: Buffer) -> int:
        """Return the length of the plaintext; no sealer makes a record of another length than this allows."""
        num_bytes = len(record) - TAG_BYTES
        if self._dead or not 0 <= num_bytes <= CHUNK_BYTES:
            raise self._die()
        return num_bytes

    def _die(self) -> IntegrityError:
        self._dead = True
        return IntegrityError(
            "A sealed record does not authenticate; this session is closed.",
            cure="Connect again. If it happens again, something between edge and cloud alters the traffic.",
        )
