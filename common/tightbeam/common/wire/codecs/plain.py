"""Floats as they are, and int8 with a scale per token.

Cut activations have huge outliers (a first token's norm can be 100 times the median), so the integer codec
scales each token by its own largest value. N = tokens, D = hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightbeam.common.wire.codecs.base import (
    as_bytes,
    check_finite_input,
    check_finite_output,
    check_length,
    count_bytes,
    noise_like,
)

__all__ = ["FLOATS", "Float", "Int8"]

_FP32 = torch.finfo(torch.float32)


@dataclass(frozen=True, slots=True)
class Float:
    """IEEE or bfloat16 values as they are; lossless for tensors of that dtype. NaN and Inf pass."""

    name: str
    dtype: torch.dtype

    def planes(self, size: int) -> tuple[int, ...]:
        """The values."""
        return (size * self.dtype.itemsize,)

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Length of the payload."""
        return count_bytes(self, shape)

    def encode(self, tensor_ND: Tensor, *, seed: int = 0) -> Tensor:
        """The values, row by row."""
        return as_bytes(tensor_ND.detach().to(self.dtype)).cpu()

    def decode(
        self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The values; without a copy when dtype and device are the payload's."""
        check_length(self, payload, shape)
        return payload.view(self.dtype).view(*shape).to(device).to(dtype)


@dataclass(frozen=True, slots=True)
class Int8:
    """Symmetric int8 with one fp32 scale per token: `x ~ q * scale`, `|x - q * scale| <= scale / 2`.

    Stochastic rounding is right on average and within one scale. Layout: N fp32 scales, then N*D int8. NaN
    and Inf are refused.
    """

    name: str
    stochastic: bool = False

    def planes(self, size: int) -> tuple[int, ...]:
        """A scale and the codes."""
        return 4, size

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Length of the payload."""
        return count_bytes(self, shape)

    def encode(self, tensor_ND: Tensor, *, seed: int = 0) -> Tensor:
        """Scales and codes; `NonFiniteError` for NaN or Inf."""
        values_ND = tensor_ND.detach().float()
        check_finite_input(self, values_ND, _FP32.max)
        # the smallest normal number keeps rows of zeros, and scales from becoming denormal
        scale_N1 = (values_ND.abs().amax(-1, keepdim=True) / 127).clamp_min(_FP32.tiny)
        codes_ND = values_ND / scale_N1
        if self.stochastic:
            codes_ND = codes_ND.add_(noise_like(codes_ND, seed)).floor_()
        else:
            codes_ND = codes_ND.round_()
        codes_ND = codes_ND.clamp_(-127, 127).to(torch.int8)
        return torch.cat([as_bytes(scale_N1), as_bytes(codes_ND)]).cpu()

    def decode(
        self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Codes times scales; `CodecError` when a product is not finite."""
        check_length(self, payload, shape)
        payload = payload.to(device)
        num_scales = math.prod(shape[:-1])
        scale_N1 = payload[: 4 * num_scales].view(torch.float32).view(*shape[:-1], 1)
        codes_ND = payload[4 * num_scales :].view(torch.int8).view(*shape)
        values_ND = codes_ND * scale_N1
        check_finite_output(self, values_ND, torch.finfo(dtype).max)
        return values_ND.to(dtype)


FLOATS = (Float("fp32", torch.float32), Float("bf16", torch.bfloat16))
