"""How a tensor becomes bytes. All work on torch tensors of any device; payloads are little-endian.

Cut activations have huge outliers (a first token's norm can be 100 times the median), so the integer codec
scales each token by its own largest value. N = tokens, D = hidden size.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tightbeam.common.errors import CodecError, NonFiniteError

__all__ = ["CODECS", "Codec", "codec", "lossless"]

assert sys.byteorder == "little", "payloads are little-endian"


class Codec(Protocol):
    """One way to code tensors of shape `[N, D]`."""

    @property
    def name(self) -> str:
        """Name in headers and recipes."""
        ...

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Length of the payload of a tensor of this shape."""
        ...

    def encode(self, tensor_ND: Tensor) -> Tensor:
        """The payload, uint8 `[num_bytes]`, contiguous, on the CPU."""
        ...

    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor on the CPU; may share the payload's memory. `CodecError` when the length is wrong."""
        ...


@dataclass(frozen=True, slots=True)
class _Float:
    """IEEE or bfloat16 values as they are; lossless for tensors of that dtype. NaN and Inf pass."""

    name: str
    dtype: torch.dtype

    def num_bytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def encode(self, tensor_ND: Tensor) -> Tensor:
        return _bytes(tensor_ND.detach().to(self.dtype))

    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        _check(self, payload, shape)
        return payload.view(self.dtype).view(*shape).to(dtype)


@dataclass(frozen=True, slots=True)
class _Int8:
    """Symmetric int8 with one fp32 scale per token: `x ~ q * scale`, `|x - q * scale| <= scale / 2`.

    Layout: N fp32 scales, then N*D int8. NaN and Inf are refused.
    """

    name: str = "int8"

    def num_bytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape[:-1]) * 4 + math.prod(shape)

    def encode(self, tensor_ND: Tensor) -> Tensor:
        values_ND = tensor_ND.detach().float()
        peak_N1 = values_ND.abs().amax(-1, keepdim=True)
        if not bool(torch.isfinite(peak_N1).all()):
            raise NonFiniteError("A tensor with NaN or Inf cannot be coded as int8.", cure=_NON_FINITE_CURE)
        # the smallest normal number keeps rows of zeros, and scales from becoming denormal
        scale_N1 = (peak_N1 / 127).clamp_min(torch.finfo(torch.float32).tiny)
        codes_ND = (values_ND / scale_N1).round_().clamp_(-127, 127).to(torch.int8)
        return torch.cat([_bytes(scale_N1), _bytes(codes_ND)])

    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        _check(self, payload, shape)
        num_scales = math.prod(shape[:-1])
        scale_N1 = payload[: 4 * num_scales].view(torch.float32).view(*shape[:-1], 1)
        if not bool(torch.isfinite(scale_N1).all()):
            raise CodecError("An int8 payload holds scales that are not finite.")
        codes_ND = payload[4 * num_scales :].view(torch.int8).view(*shape)
        return (codes_ND * scale_N1).to(dtype)


CODECS: dict[str, Codec] = {
    c.name: c for c in (_Float("fp32", torch.float32), _Float("bf16", torch.bfloat16), _Int8())
}


def codec(name: str) -> Codec:
    """Look one up by name."""
    try:
        return CODECS[name]
    except KeyError:
        raise CodecError(f"Unknown codec {name!r}.", cure=f"Known codecs: {', '.join(CODECS)}.") from None


def lossless(dtype: torch.dtype) -> str:
    """The smallest codec that changes nothing in tensors of `dtype`."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


_NON_FINITE_CURE = "Lower the learning rate or clip gradients; the last checkpoint is untouched."


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().cpu().view(torch.uint8).reshape(-1)


def _check(which: Codec, payload: Tensor, shape: Sequence[int]) -> None:
    if payload.dtype != torch.uint8 or payload.numel() != which.num_bytes(shape):
        raise CodecError(
            f"A {which.name} payload for shape {tuple(shape)} has {payload.numel()} bytes, "
            f"not {which.num_bytes(shape)}."
        )
