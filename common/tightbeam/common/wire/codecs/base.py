"""What every codec is, and the checks that all of them share. N = tokens, D = hidden size."""

import math
import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tightbeam.common.errors import CodecError, NonFiniteError

__all__ = [
    "Codec",
    "as_bytes",
    "check_finite_input",
    "check_finite_output",
    "check_length",
    "count_bytes",
    "noise_like",
]

assert sys.byteorder == "little", "payloads are little-endian"


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


def noise_like(values: Tensor, seed: int) -> Tensor:
    """Uniform in `[0, 1)`: the same on every call with this shape, device kind and seed."""
    generator = torch.Generator(values.device).manual_seed(seed)
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
