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
    planes_of,
    slices,
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
        tensor_ND = tensor_ND.detach().reshape(-1, tensor_ND.shape[-1])
        device = tensor_ND.device
        payload = torch.empty(self.num_bytes(tensor_ND.shape), dtype=torch.uint8, device=device)
        scale_N1, codes_ND = self._parts(payload, tensor_ND.shape)
        noise = torch.Generator(device).manual_seed(seed)
        for rows in slices(tensor_ND.shape, device):
            values_ND = tensor_ND[rows].float()
            check_finite_input(self, values_ND, _FP32.max)
            # the smallest normal number keeps rows of zeros, and scales from becoming denormal
            scale_N1[rows] = (values_ND.abs().amax(-1, keepdim=True) / 127).clamp_min_(_FP32.tiny)
            values_ND = values_ND / scale_N1[rows]
            if self.stochastic:
                values_ND.add_(noise_like(values_ND, noise)).floor_()
            else:
                values_ND.round_()
            codes_ND[rows] = values_ND.clamp_(-127, 127)
        return payload.cpu()

    def decode(
        self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Codes times scales; `CodecError` when a product is not finite."""
        check_length(self, payload, shape)
        out_ND = torch.empty(math.prod(shape[:-1]), shape[-1], dtype=dtype, device=device)
        scale_N1, codes_ND = self._parts(payload.to(device), out_ND.shape)
        for rows in slices(out_ND.shape, out_ND.device):
            values_ND = codes_ND[rows] * scale_N1[rows]
            check_finite_output(self, values_ND, torch.finfo(dtype).max)
            out_ND[rows] = values_ND
        return out_ND.view(*shape)

    def _parts(self, payload: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        scale_N4, codes_ND = planes_of(self, payload, shape)
        return scale_N4.view(torch.float32), codes_ND.view(torch.int8)


FLOATS = (Float("fp32", torch.float32), Float("bf16", torch.bfloat16))
