"""What a client does to its update before anybody may see it: it bounds its length and adds noise.

Differential privacy of a sum needs two things: no client's change is longer than a bound, and the sum has
Gaussian noise in proportion to it. Where the server must not be trusted with the noise either, each client
adds a part: independent parts of std s give sqrt(k) s in the sum of k clients.

The noise comes from AES-256 in counter mode under fresh random bytes, by Box and Muller: who can predict it
can take it away. It is double precision, not exactly Gaussian: attacks on the last bits of floating-point
noise (Mironov, CCS 2012) are not answered here.
"""

import math
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tightbeam.federation.math.lora import Arrays
from tightbeam.federation.secagg.masks import SEED_BYTES, add_mask, ring_dtype

__all__ = ["clipped", "gaussian", "length", "noised"]

Entropy = Callable[[int], bytes]


def length(change: Arrays) -> float:
    """L2 norm over all tensors together."""
    return math.sqrt(sum(float(np.sum(np.square(array, dtype=np.float64))) for array in change.values()))


def clipped(after: Arrays, before: Arrays, norm: float) -> dict[str, NDArray[np.float64]]:
    """Arrays whose change since `before` is at most `norm` long, in the direction that it had.

    `before` may hold more arrays than `after`. NaN stays NaN: whoever encodes it refuses it.
    """
    change = {name: array.astype(np.float64) - before[name] for name, array in after.items()}
    size = length(change)
    shrink = norm / size if size > norm else 1.0
    return {name: before[name] + shrink * step for name, step in change.items()}


def noised(arrays: Arrays, std: float, entropy: Entropy = os.urandom) -> dict[str, NDArray[np.float64]]:
    """Arrays with independent Gaussian noise on every value."""
    return {
        name: array + gaussian(array.size, std, entropy(SEED_BYTES)).reshape(array.shape)
        for name, array in arrays.items()
    }


def gaussian(size: int, std: float, seed: bytes) -> NDArray[np.float64]:
    """`size` draws from N(0, std^2) that nobody without the seed can tell from other ones."""
    pairs = (size + 1) // 2
    words = np.zeros(2 * pairs, ring_dtype(64))
    add_mask(words, seed)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), never an end
    radius, angle = std * np.sqrt(-2 * np.log(uniform[:pairs])), 2 * math.pi * uniform[pairs:]
    both: NDArray[np.float64] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return both[:size]
