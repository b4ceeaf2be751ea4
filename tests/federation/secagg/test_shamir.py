"""Any `threshold` shares give the secret; any fewer fit every secret there is."""

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightbeam.common.errors import CohortError, ProtocolError
from tightbeam.federation.secagg.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, deal, recover

SECRETS = st.binary(min_size=32, max_size=32)


def is_prime(number: int) -> bool:
    """Miller-Rabin with 40 bases: wrong with a chance below 2**-80."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    bases = random.Random(0)
    for _ in range(40):
        power = pow(bases.randrange(2, number - 1), odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def test_the_field_is_a_field_and_holds_every_secret() -> None:
    assert is_prime(PRIME)
    assert not any(is_prime(smaller) for smaller in range(2**256 + 1, PRIME, 2))
    assert PRIME > 2 ** (8 * SECRET_BYTES)
    assert PRIME < 2 ** (8 * SHARE_BYTES)


@given(data=st.data(), secret=SECRETS, count=st.integers(1, 9))
def test_any_threshold_of_shares_recovers(data: st.DataObject, secret: bytes, count: int) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = deal(secret, threshold, range(1, count + 1), os.urandom)
    holders = data.draw(st.sets(st.sampled_from(sorted(shares)), min_size=threshold))
    assert recover({point: shares[point] for point in holders}, threshold) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_smallest_and_largest_secret(secret: bytes) -> None:
    shares = deal(secret, 3, [1, 2, 3, 4], os.urandom)
    assert recover(shares, 3) == secret


def test_one_share_fewer_is_an_error() -> None:
    shares = deal(os.urandom(32), 3, [1, 2, 3, 4], os.urandom)
    with pytest.raises(CohortError, match="2 shares of a secret are here, and 3 are needed"):
        recover({point: shares[point] for point in (2, 4)}, 3)


@given(secret=SECRETS, other=SECRETS)
def test_one_share_fewer_fits_every_secret(secret: bytes, other: bytes) -> None:
    """Perfect secrecy: with two of three shares, some third share makes any other secret of them."""
    shares = deal(secret, 3, [1, 2, 3], os.urandom)
    # The line through the point 0 with `other` and the two shares has exactly one value at 3.
    points = {0: int.from_bytes(other), 1: int.from_bytes(shares[1]), 2: int.from_bytes(shares[2])}
    third = (points[0] - 3 * points[1] + 3 * points[2]) % PRIME
    forged = {1: shares[1], 2: shares[2], 3: third.to_bytes(SHARE_BYTES)}
    assert recover(forged, 3) == other


def test_a_wrong_share_does_not_give_the_secret() -> None:
    secret = os.urandom(32)
    shares = deal(secret, 2, [1, 2], os.urandom)
    shares[2] = bytes(SHARE_BYTES - 1) + b"\x07"
    assert recover(shares, 2) != secret


def test_shares_of_no_secret_are_told() -> None:
    """The field has 297 values more than there are secrets."""
    beyond = (2**256 + 5).to_bytes(SHARE_BYTES)
    with pytest.raises(ProtocolError, match="do not belong together"):
        recover({1: beyond, 2: beyond}, 2)  # a constant polynomial


def test_dealing_draws_fresh_polynomials() -> None:
    secret = os.urandom(32)
    one, other = (deal(secret, 2, [1, 2], os.urandom) for _ in range(2))
    assert one[1] != other[1]
