"""int4 and int5: outliers aside, the rest rotated, one scale per 64 values.

A few channels hold most of a token's energy (at SmolLM2's cut 2:2 four of 576 hold more than half), and a
scale that reaches them leaves four bits nothing for the others. So the largest of each token travel by
themselves, and an orthonormal Hadamard rotation within blocks of 64 channels (QuaRot, arXiv 2404.00456)
spreads what is left evenly over the codes. The rotation is made of additions alone, so every machine decodes
to the same bits: the two ends of delta coding must not drift apart.

N = tokens, D = hidden size, M = blocks, B = block width, G = scales of a token, K = outliers of a token.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tightbeam.common.errors import CodecError
from tightbeam.common.wire.codecs.base import (
    as_bytes,
    check_finite_input,
    check_finite_output,
    check_length,
    count_bytes,
    noise_like,
)
from tightbeam.common.wire.codecs.packing import pack, packed_widths, unpack

__all__ = ["BLOCK", "CHANNELS_PER_OUTLIER", "LIMIT", "Rotated", "hadamard_", "signs"]

BLOCK = 64  # channels that are rotated together and share a scale
CHANNELS_PER_OUTLIER = 128
LIMIT = 2.0**100  # larger magnitudes are refused: sums of a block stay finite, whatever a payload says
_LARGEST_SCALE = LIMIT * BLOCK
_MAX_CHANNELS = 2**16  # an outlier's place has 16 bits


@dataclass(frozen=True, slots=True)
class Rotated:
    """Codes of `bits` bits for rotated values; per token also G bf16 scales and K outliers of 4 bytes.

    A block's error has at most the norm `1.07 * |scale| * sqrt(B)`; a stochastic one's too, and it is zero on
    average. NaN, Inf and magnitudes above `LIMIT` are refused.
    """

    name: str
    bits: int
    stochastic: bool = False

    def planes(self, size: int) -> tuple[int, ...]:
        """Scales, places and values of the outliers, then the planes of `pack`."""
        if size > _MAX_CHANNELS:
            raise CodecError(f"{self.name} codes up to {_MAX_CHANNELS} channels, not {size}.")
        num_outliers = size // CHANNELS_PER_OUTLIER
        return 2 * _num_groups(size), 2 * num_outliers, 2 * num_outliers, *packed_widths(size, self.bits)

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Length of the payload."""
        return count_bytes(self, shape)

    def encode(self, tensor_ND: Tensor, *, seed: int = 0) -> Tensor:
        """Scales, places and values of the outliers, codes; `NonFiniteError` for what is not finite."""
        size = tensor_ND.shape[-1]
        values_ND = tensor_ND.detach().float().reshape(-1, size)
        check_finite_input(self, values_ND, LIMIT)
        place_NK = values_ND.abs().topk(size // CHANNELS_PER_OUTLIER, sorted=False).indices
        outlier_NK = values_ND.gather(1, place_NK)
        stored_NK = outlier_NK.to(torch.bfloat16)
        # what bf16 leaves of an outlier is coded with the rest
        rest_ND = values_ND.scatter(1, place_NK, outlier_NK - stored_NK.float())
        num_tokens = values_ND.shape[0]
        coded = [self._quantise(hadamard_(piece), seed) for piece in _split(rest_ND * _signs(rest_ND))]
        scale_NG = _join([scale for scale, _ in coded], num_tokens)
        codes_ND = _join([codes for _, codes in coded], num_tokens)
        parts = (scale_NG, place_NK.to(torch.int16), stored_NK, *pack(codes_ND, self.bits))
        return torch.cat([as_bytes(part) for part in parts]).cpu()

    def decode(
        self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Inverse of `encode` up to rounding; always finite, or `CodecError`."""
        check_length(self, payload, shape)
        payload = payload.to(device)
        size, num_tokens = shape[-1], math.prod(shape[:-1])
        planes = payload.split([num_tokens * width for width in self.planes(size)])
        scale_NG = planes[0].view(torch.bfloat16).view(num_tokens, -1).float()
        place_NK = planes[1].view(torch.int16).view(num_tokens, size // CHANNELS_PER_OUTLIER).long() & 0xFFFF
        outlier_NK = planes[2].view(torch.bfloat16).view_as(place_NK).float()
        check_finite_output(self, scale_NG, _LARGEST_SCALE)
        check_finite_output(self, outlier_NK, 2 * LIMIT)
        if bool((place_NK >= size).any()):
            raise CodecError(f"A {self.name} payload names channels beyond {size}.")
        rest_ND = unpack(planes[3:], num_tokens, size).float().sub_(self._middle)
        scales = scale_NG.split([count for count, _ in _blocks(size)], 1)
        pieces = [
            hadamard_(codes_MB.mul_(scale_NC.reshape(-1, 1)))
            for codes_MB, scale_NC in zip(_split(rest_ND), scales, strict=True)
        ]
        values_ND = _join(pieces, num_tokens).mul_(_signs(rest_ND)).scatter_add_(1, place_NK, outlier_NK)
        if dtype == torch.float16:  # rounding may lead just beyond its largest number
            values_ND.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
        return values_ND.to(dtype).view(*shape)

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    def _quantise(self, values_MB: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Scales (bf16) `[M]` and unsigned codes `[M, B]`; overwrites its input."""
        low_M, high_M = values_MB.amin(1), values_MB.amax(1)
        middle = self._middle
        if self.stochastic:
            # codes that need no clamp, else the mean would be off: bf16 must not round the scale down
            scale_M = torch.maximum(high_M, -low_M) * ((1 + 2**-7) / (middle - 1))
        else:
            # the extreme value takes the one code that has no opposite
            scale_M = torch.where(high_M > -low_M, high_M, low_M) / -middle
        tiny = torch.finfo(torch.float32).tiny
        scale_M = torch.where(scale_M.abs() < tiny, tiny, scale_M).to(torch.bfloat16)
        codes_MB = values_MB.div_(scale_M.float()[:, None])
        if self.stochastic:
            codes_MB = codes_MB.add_(noise_like(codes_MB, seed)).floor_()
        else:
            codes_MB = codes_MB.round_()
        return scale_M, codes_MB.clamp_(-middle, middle - 1).add_(middle).to(torch.uint8)


@lru_cache
def signs() -> tuple[int, ...]:
    """The 64 signs of the rotation: the bits of a published hash, so that nobody chose them."""
    word = int.from_bytes(hashlib.sha256(b"tightbeam/rotation/1").digest()[: BLOCK // 8], "little")
    return tuple(1 - 2 * (word >> i & 1) for i in range(BLOCK))


def hadamard_(values_MB: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of each row, `B = 2^n`; its own inverse. Overwrites its input.

    Butterflies add in one fixed order, which no thread count, device or TF32 setting changes.
    """
    num_rows, width = values_MB.shape
    spare_MB, half = torch.empty_like(values_MB), 1  # two buffers: fresh pages cost more than the sums
    while half < width:
        source, target = (t.view(num_rows, width // (2 * half), 2, half) for t in (values_MB, spare_MB))
        torch.add(source[:, :, 0], source[:, :, 1], out=target[:, :, 0])
        torch.sub(source[:, :, 0], source[:, :, 1], out=target[:, :, 1])
        values_MB, spare_MB, half = spare_MB, values_MB, 2 * half
    return values_MB.mul_(width**-0.5)


@lru_cache
def _blocks(size: int) -> tuple[tuple[int, int], ...]:
    """How D channels are split: counts of blocks and their width, 64 and then powers of two below it."""
    widths = [1 << bit for bit in reversed(range(6)) if size >> bit & 1]
    full = [(size // BLOCK, BLOCK)] if size >= BLOCK else []
    return (*full, *((1, width) for width in widths))


def _num_groups(size: int) -> int:
    return sum(count for count, _ in _blocks(size))


def _split(values_ND: Tensor) -> list[Tensor]:
    """`[N, D]` as one contiguous `[N * count, width]` per kind of block."""
    blocks = _blocks(values_ND.shape[1])
    pieces = values_ND.split([count * width for count, width in blocks], 1)
    return [piece.reshape(-1, width) for piece, (_, width) in zip(pieces, blocks, strict=True)]


def _join(pieces: list[Tensor], num_tokens: int) -> Tensor:
    """Inverse of `_split`, for what is per block too."""
    return torch.cat([piece.reshape(num_tokens, -1) for piece in pieces], 1)


def _signs(values_ND: Tensor) -> Tensor:
    size = values_ND.shape[1]
    repeats = -(-size // BLOCK)
    return torch.tensor(signs(), dtype=torch.float32, device=values_ND.device).repeat(repeats)[:size]
