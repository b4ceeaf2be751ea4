"""Shamir's secret sharing of 32 bytes (Shamir 1979): `threshold` shares give the secret, fewer say nothing.

The field is the integers modulo p = 2**256 + 297, the smallest prime that holds every secret of 32 bytes. The
dealer draws a polynomial of degree threshold - 1 with the secret as its constant; a share is its value at the
holder's point 1, 2, 3, ... Any threshold - 1 shares fit every possible secret equally well.

Python's integers do not compute in constant time. Dealing and recovering happen once a round, on the machine
of the one who holds the secret or is meant to learn it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from tightbeam.common.errors import CohortError, ProtocolError

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "deal", "recover"]

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def deal(
    secret: bytes, threshold: int, points: Sequence[int], entropy: Callable[[int], bytes]
) -> dict[int, bytes]:
    """Share `secret` among `points`; `entropy(n)` gives n secret random bytes."""
    assert len(secret) == SECRET_BYTES
    assert 1 <= threshold <= len(points)
    assert all(0 < point < PRIME for point in points), "the point 0 is the secret itself"
    # 48 bytes reduced modulo a 257-bit prime are within 2**-127 of uniform.
    coefficients = [int.from_bytes(entropy(48)) % PRIME for _ in range(threshold - 1)]
    shares = {}
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value + coefficient) * point % PRIME
        shares[point] = ((value + int.from_bytes(secret)) % PRIME).to_bytes(SHARE_BYTES)
    return shares


def recover(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret from the first `threshold` shares by point.

    A wrong share gives a wrong secret, or none: whoever recovers must hold it against a commitment.

    Raises:
        CohortError: fewer shares than the threshold.
        ProtocolError: what the shares give is no secret: they do not belong together.

    """
    if len(shares) < threshold:
        raise CohortError(
            f"{len(shares)} shares of a secret are here, and {threshold} are needed.",
            cure="Run the round again with the clients that are up.",
        )
    points = tuple(sorted(shares)[:threshold])
    weights = _lagrange_at_zero(points)
    secret = (
        sum(weight * int.from_bytes(shares[point]) for point, weight in zip(points, weights, strict=True))
        % PRIME
    )
    if secret >> (8 * SECRET_BYTES):
        raise ProtocolError("The shares of a secret do not belong together.")
    return secret.to_bytes(SECRET_BYTES)


@lru_cache(maxsize=8)  # a round recovers one secret per client, all from the same holders
def _lagrange_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    weights = []
    for point in points:
        numerator = denominator = 1
        for other in points:
            if other != point:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - point) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(weights)
