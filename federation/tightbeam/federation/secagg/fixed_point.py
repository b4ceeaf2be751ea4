"""Real numbers as elements of the masks' ring and back, with a bound on the error and none on the luck.

A value x is clipped to [-clip, clip], rounded to a multiple of 2**-f and multiplied by its client's integer
weight. The sum over clients is a plain integer sum as long as it does not leave the ring's signed half:

    clip * 2**f * max_weight * max_clients  <  2**(ring_bits - 1)

`FixedPoint.fitting` takes the largest f for which this holds, so no choice of values can overflow. Rounding
moves each value by at most 2**-(f + 1), and so the weighted mean by at most that: the weights cancel. Reading
the mean back in float64 adds at most clip * 2**-52.

The last element of every vector is the client's weight itself, so that the server learns the sum of the
weights and not the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, ldexp, prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tightbeam.common.errors import FederationError, UpdateRefusedError
from tightbeam.federation.secagg.masks import RingVector, ring_dtype

__all__ = ["FixedPoint", "Layout", "WeightedSum"]

_FINEST_BITS = 40  # far below float32's own precision, far above float64's


def _fits(clip: float, fraction_bits: int, max_weight: int, max_clients: int, ring_bits: int) -> bool:
    largest_value = max(ceil(ldexp(clip, fraction_bits)), 1)  # 1: the weight's own element
    limit: int = 2 ** (ring_bits - 1)
    return largest_value * max_weight * max_clients < limit


@dataclass(frozen=True, slots=True, eq=False)
class WeightedSum:
    """What the protocol yields: `sum_k w_k x_k` and `sum_k w_k`."""

    total: NDArray[np.float64]
    weight: int

    @property
    def mean(self) -> NDArray[np.float64]:
        """The weighted mean of the clients' vectors."""
        return self.total / self.weight


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """The public parameters of the encoding; the same for all clients of a round."""

    clip: float
    fraction_bits: int  # f: values are multiples of 2**-f
    max_weight: int
    max_clients: int
    ring_bits: int  # 32 or 64: 4 or 8 bytes a value on the wire

    def __post_init__(self) -> None:
        whole = min(self.max_weight, self.max_clients) >= 1 and self.ring_bits in (32, 64)
        whole = whole and 0 <= self.fraction_bits <= _FINEST_BITS
        if not (
            whole
            and 0 < self.clip < float("inf")
            and _fits(self.clip, self.fraction_bits, self.max_weight, self.max_clients, self.ring_bits)
        ):
            raise FederationError(
                f"{self} can overflow its ring.", cure="Take FixedPoint.fitting, or a ring of 64 bits."
            )

    @classmethod
    def fitting(cls, clip: float, max_weight: int, max_clients: int, ring_bits: int = 64) -> Self:
        """Choose the finest fraction that cannot overflow.

        Raises:
            FederationError: even whole numbers could overflow.

        """
        bits = _FINEST_BITS
        while bits and not _fits(clip, bits, max_weight, max_clients, ring_bits):
            bits -= 1
        return cls(clip, bits, max_weight, max_clients, ring_bits)

    @property
    def error_bound(self) -> float:
        """Most by which an element of the weighted mean can differ, for values within the clip range."""
        return 2.0 ** -(self.fraction_bits + 1) + self.clip * 2.0**-52

    def encode(self, values: NDArray[np.floating[Any]], weight: int, client: str) -> RingVector:
        """Encode a client's values; the result has one element more.

        Raises:
            UpdateRefusedError: a value that is not finite or outside the clip range, or a weight outside
                1..max_weight. Clip before, if that is meant: silently, it would bias the mean.

        """
        if not (weight == int(weight) and 1 <= weight <= self.max_weight):
            raise UpdateRefusedError(
                f"The weight {weight} of {client} is no whole number from 1 to {self.max_weight}.",
                cure="Raise max_weight for the round, or count in larger units.",
            )
        flat = values.astype(np.float64).ravel()
        outside = int(flat.size - np.count_nonzero(np.abs(flat) <= self.clip))  # NaN is outside too
        if outside:
            raise UpdateRefusedError(
                f"{outside} of {flat.size} values of {client} lie outside +-{self.clip} or are not finite.",
                cure="Clip them, or raise the round's clip range.",
            )
        steps = np.rint(flat * 2.0**self.fraction_bits).astype(np.int64) * int(weight)
        # Casting int64 to a smaller unsigned type keeps the low bits: exactly the residue modulo the ring.
        return np.append(steps, np.int64(weight)).astype(ring_dtype(self.ring_bits))

    def decode(self, total: RingVector) -> WeightedSum:
        """Decode the sum of encoded vectors of at most `max_clients` clients."""
        signed = total.view(f"<i{self.ring_bits // 8}").astype(np.int64)
        return WeightedSum(signed[:-1] / 2.0**self.fraction_bits, int(signed[-1]))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each named array lies in the flat vector; in the order of the names."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, state: Mapping[str, NDArray[Any]]) -> Self:
        """Return the layout of these arrays."""
        return cls(tuple((name, state[name].shape) for name in sorted(state)))

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(prod(shape) for _, shape in self.shapes)

    def flatten(self, state: Mapping[str, NDArray[np.floating[Any]]], client: str) -> NDArray[np.float64]:
        """Lay the arrays end to end.

        Raises:
            UpdateRefusedError: other names or shapes than the layout's, NaN or infinity. Under the masks
                nobody could tell, and one value would spoil the sum for all.

        """
        if Layout.of(state) != self:
            differing = sorted(set(Layout.of(state).shapes) ^ set(self.shapes))[0][0]
            raise UpdateRefusedError(
                f"The update of {client} is refused: {differing} is missing, unasked or of another shape.",
                cure="Secure aggregation adds vectors: all clients need the same adapter config and rank.",
            )
        for name, _ in self.shapes:
            if not np.isfinite(state[name]).all():
                raise UpdateRefusedError(
                    f"The update of {client} is refused: {name} holds NaN or infinite values.",
                    cure="Lower the learning rate, or find out what its data hold.",
                )
        parts = [state[name].astype(np.float64).ravel() for name, _ in self.shapes]
        return np.concatenate(parts) if parts else np.zeros(0)

    def unflatten(self, vector: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Cut a vector back into the named arrays."""
        assert vector.shape == (self.size,)
        state, start = {}, 0
        for name, shape in self.shapes:
            state[name] = vector[start : start + prod(shape)].reshape(shape)
            start += prod(shape)
        return state
