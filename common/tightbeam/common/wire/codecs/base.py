"""What every codec is, and the checks that all of them share. N = tokens, D = hidden size."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tightbeam.common.errors import CodecError, NonFiniteError

__all__ = [
    "CACHED_VALUES",
    "Codec",
    "as_bytes",
    "check_finite_input",
    "check_finite_output",
    "check_length",
    "count_bytes",
    "noise_like",
    "planes_of",
    "slices",
]

assert sys.byteorder == "little", "payloads are little-endian"

CACHED_VALUES = 2**19
"""float32 that a core's cache holds between the passes over them; fresh pages cost more than the sums."""


class Codec(Protocol):
    """One way to code tensors of shape `[N, D]`."""

    @property
    def name(self) -> str:
        """Name in headers and recipes."""
        ...

    def planes(self, size: int) -> tuple[int, ...]:
        """Bytes per token of each plane, D = `size`; a payload is its planes one after the other.

        So a token's part of a payload can be cut out and put into another one.
        """
        ...

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Length of the payload of a tensor of this shape."""
        ...

    def encode(self, tensor_ND: Tensor, *, seed: int = 0) -> Tensor:
        """The payload, uint8 `[num_bytes]`, contiguous, on the CPU; computed where the tensor lies.

        The same tensor and seed give the same bytes. Only codecs that round stochastically look at the seed.
        """
        ...

    def decode(
        self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The tensor, computed on `device`; may share the payload's memory.

        `CodecError` when the length is wrong or the bytes are none that `encode` makes.
        """
        ...


def count_bytes(which: Codec, shape: Sequence[int]) -> int:
    """Bytes of all planes of all tokens."""
    return math.prod(shape[:-1]) * sum(which.planes(shape[-1]))


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor, uint8, on the device it lies on."""
    return tensor.contiguous().view(torch.uint8).reshape(-1)


def planes_of(which: Codec, payload: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """The planes of a payload, each `[N, bytes per token]`; they share its memory."""
    num_rows, widths = math.prod(shape[:-1]), which.planes(shape[-1])
    parts = payload.split([num_rows * width for width in widths])
    return [part.view(num_rows, width) for part, width in zip(parts, widths, strict=True)]


def slices(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """The rows of an `[N, D]` in pieces: a CPU's cache holds one, a GPU gets all at once."""
    num_rows, size = shape
    step = max(CACHED_VALUES // size, 1) if device.type == "cpu" else max(num_rows, 1)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def noise_like(values: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in `[0, 1)`; drawn for one piece after the other it is what one draw for all would be."""
    return torch.rand(values.shape, generator=generator, device=values.device)


def check_length(which: Codec, payload: Tensor, shape: Sequence[int]) -> None:
    """`CodecError` unless the payload has exactly the bytes that the shape needs."""
    if payload.dtype != torch.uint8 or payload.numel() != which.num_bytes(shape):
        raise CodecError(
            f"A {which.name} payload for shape {tuple(shape)} has {payload.numel()} bytes, "
            f"not {which.num_bytes(shape)}."
        )


def check_finite_input(which: Codec, values: Tensor, limit: float) -> None:
    """`NonFiniteError` for NaN, Inf and magnitudes above `limit`."""
    if not _within(values, limit):
        raise NonFiniteError(
            f"A tensor with NaN, Inf or magnitudes above {limit:.3g} cannot be coded as {which.name}.",
            cure="Lower the learning rate or clip gradients; the last checkpoint is untouched.",
        )


def check_finite_output(which: Codec, values: Tensor, limit: float) -> None:
    """`CodecError` for what no encoder puts into a payload."""
    if not _within(values, limit):
        raise CodecError(f"A {which.name} payload holds values that are not finite or above {limit:.3g}.")


def _within(values: Tensor, limit: float) -> bool:
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return bool((low >= -limit) & (high <= limit))  # both are false for NaN, which aminmax hands on
