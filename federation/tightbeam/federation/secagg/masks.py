"""Masks: 32 secret bytes become a vector that nobody without them can tell from random.

AES-256 in counter mode is the generator and a seed is its key. The nonce is fixed at zero because a seed is
used once: it belongs to one round and one pair of clients, or to one client's own mask. Output bytes are read
as little-endian integers of the ring, Z mod 2**32 or Z mod 2**64: every element is exactly as likely as every
other, which a modulus that is no power of two could not give without rejections.
"""

from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

__all__ = ["SEED_BYTES", "RingVector", "add_mask", "ring_dtype"]

SEED_BYTES = 32
RingVector = NDArray[np.unsignedinteger[Any]]  # uint32 or uint64, little-endian; sums wrap around

_CHUNK_BYTES = 1 << 18  # stays in the processor's cache between the cipher and the addition
_ZEROS = bytes(_CHUNK_BYTES)
_BLOCK_BYTES = 16


def ring_dtype(ring_bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the numpy type of the ring's elements, the same bytes on every machine."""
    assert ring_bits in (32, 64)
    dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(f"<u{ring_bits // 8}")
    return dtype


def add_mask(vector: RingVector, seed: bytes, *, subtract: bool = False) -> None:
    """Add the seed's mask to `vector` in place, or take it away; both wrap around."""
    assert len(seed) == SEED_BYTES
    stream = Cipher(AES256(seed), CTR(bytes(_BLOCK_BYTES))).encryptor()
    scratch = bytearray(_CHUNK_BYTES + _BLOCK_BYTES - 1)  # as `update_into` asks for
    elements = _CHUNK_BYTES // vector.itemsize
    mask = np.frombuffer(scratch, vector.dtype, count=elements)
    combine = np.subtract if subtract else np.add
    for start in range(0, vector.size, elements):
        part = vector[start : start + elements]
        stream.update_into(memoryview(_ZEROS)[: part.nbytes], scratch)
        combine(part, mask[: part.size], out=part)
