"""Masks are AES-256 in counter mode, cancel exactly and look like nothing."""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given
from hypothesis import strategies as st

from tightbeam.federation.secagg.masks import RingVector, add_mask, ring_dtype

RINGS = [32, 64]


def mask(size: int, seed: bytes, ring_bits: int = 32) -> RingVector:
    vector = np.zeros(size, ring_dtype(ring_bits))
    add_mask(vector, seed)
    return vector


def test_the_first_block_is_the_published_one() -> None:
    """AES-256 of a zero block under a zero key: the hash key H of the GCM specification's test case 13."""
    assert mask(4, bytes(32)).tobytes().hex() == "dc95c078a2408989ad48a21492842087"


@pytest.mark.parametrize("ring_bits", RINGS)
@pytest.mark.parametrize("size", [0, 1, 3, 65_535, 65_536, 65_537, 200_001])
def test_chunks_join_to_one_key_stream(size: int, ring_bits: int) -> None:
    seed = hashlib.sha256(b"seed").digest()
    vector = mask(size, seed, ring_bits)
    stream = Cipher(AES256(seed), CTR(bytes(16))).encryptor().update(bytes(vector.nbytes))
    assert vector.tobytes() == stream


@pytest.mark.parametrize("ring_bits", RINGS)
@given(values=st.lists(st.integers(0, 2**32 - 1), max_size=50), seed=st.binary(min_size=32, max_size=32))
def test_adding_and_subtracting_cancel(values: list[int], seed: bytes, ring_bits: int) -> None:
    vector = np.array(values, ring_dtype(ring_bits))
    add_mask(vector, seed)
    add_mask(vector, seed, subtract=True)
    assert vector.tolist() == values


def test_sums_wrap_around() -> None:
    seed = bytes(32)
    vector = np.full(4, 2**32 - 1, ring_dtype(32))
    add_mask(vector, seed)
    expected = [(2**32 - 1 + int(element)) % 2**32 for element in mask(4, seed)]
    assert vector.tolist() == expected


def chi_square(elements: RingVector) -> float:
    """Distance of the elements' top bytes from uniform; 255 degrees of freedom."""
    top = (elements >> np.uint32(24)).astype(np.int64)
    counts = np.bincount(top, minlength=256)
    expected = elements.size / 256
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_mask_is_uniform() -> None:
    assert chi_square(mask(100_000, hashlib.sha256(b"a").digest())) < 255 + 5 * np.sqrt(2 * 255)


def test_what_is_not_uniform_would_be_seen() -> None:
    normal = np.random.default_rng(0).normal(0, 2**28, 100_000).astype(np.int64).astype(np.uint32)
    assert chi_square(normal) > 10_000


def test_one_bit_of_the_seed_changes_everything() -> None:
    seed = hashlib.sha256(b"a").digest()
    neighbour = bytes([seed[0] ^ 1]) + seed[1:]
    agreeing = np.count_nonzero(mask(10_000, seed) == mask(10_000, neighbour))
    assert agreeing == 0
