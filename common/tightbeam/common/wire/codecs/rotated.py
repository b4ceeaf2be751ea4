"""int4 and int5: outliers aside, the rest rotated, one scale per 64 values.

A few channels hold most of a token's energy (at SmolLM2's cut 2:2 four of 576 hold more than half), and a
scale that reaches them leaves four bits nothing for the others. So the largest of each token travel by
themselves, and an orthonormal Hadamard rotation within blocks of 64 channels (QuaRot, arXiv 2404.00456)
spreads what is left evenly over the codes. Every machine encodes to the same bytes, for the rotation is made
of additions in one order, and decodes to the same bits, for its sums are exact.

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
    check_finite_input,
    check_finite_output,
    check_length,
    count_bytes,
    noise_like,
    planes_of,
    slices,
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
        size, device = tensor_ND.shape[-1], tensor_ND.device
        tensor_ND = tensor_ND.detach().reshape(-1, size)
        payload = torch.empty(self.num_bytes(tensor_ND.shape), dtype=torch.uint8, device=device)
        planes = planes_of(self, payload, tensor_ND.shape)
        noises = [torch.Generator(device).manual_seed(seed) for _ in _blocks(size)]
        for rows in slices(tensor_ND.shape, device):
            parts = self._encode_rows(tensor_ND[rows].float(), noises)
            for plane, part in zip(planes, parts, strict=True):
                plane[rows] = part.view(torch.uint8)
        return payload.cpu()

    def decode(
        self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Inverse of `encode` up to rounding; always finite, or `CodecError`."""
        check_length(self, payload, shape)
        size, num_tokens = shape[-1], math.prod(shape[:-1])
        planes = planes_of(self, payload.to(device), shape)
        scale_NG = planes[0].view(torch.bfloat16).float()
        shape_NK = num_tokens, size // CHANNELS_PER_OUTLIER
        place_NK = planes[1].flatten().view(torch.int16).view(shape_NK).long() & 0xFFFF
        outlier_NK = planes[2].flatten().view(torch.bfloat16).view(shape_NK).float()
        check_finite_output(self, scale_NG, _LARGEST_SCALE)
        check_finite_output(self, outlier_NK, 2 * LIMIT)
        if bool((place_NK >= size).any()):
            raise CodecError(f"A {self.name} payload names channels beyond {size}.")
        out_ND = torch.empty(num_tokens, size, dtype=dtype, device=device)
        for rows in slices(out_ND.shape, out_ND.device):
            codes_ND = unpack([plane[rows] for plane in planes[3:]], size).float().sub_(self._middle)
            values_ND = _rotate_back(codes_ND, scale_NG[rows])
            values_ND.scatter_add_(1, place_NK[rows], outlier_NK[rows])
            if dtype == torch.float16:  # rounding may lead just beyond its largest number
                values_ND.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
            out_ND[rows] = values_ND
        return out_ND.view(*shape)

    def _encode_rows(self, values_ND: Tensor, noises: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
        """What these rows are in each plane."""
        num_tokens, size = values_ND.shape
        check_finite_input(self, values_ND, LIMIT)
        place_NK = values_ND.abs().topk(size // CHANNELS_PER_OUTLIER, sorted=False).indices
        outlier_NK = values_ND.gather(1, place_NK)
        stored_NK = outlier_NK.to(torch.bfloat16)
        sign_D = _signs(size, values_ND.device)
        # what bf16 leaves of an outlier is coded with the rest
        rest_ND = (values_ND * sign_D).scatter_(
            1, place_NK, (outlier_NK - stored_NK.float()) * sign_D[place_NK]
        )
        coded = [
            self._quantise(hadamard_(piece), noise)
            for piece, noise in zip(_split(rest_ND), noises, strict=True)
        ]
        scale_NG = _join([scale for scale, _ in coded], num_tokens)
        codes_ND = _join([codes for _, codes in coded], num_tokens)
        return scale_NG, place_NK.to(torch.int16), stored_NK, *pack(codes_ND, self.bits)

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    def _quantise(self, values_MB: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
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
            codes_MB = codes_MB.add_(noise_like(codes_MB, noise)).floor_()
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


def _rotate_back(codes_ND: Tensor, scale_NG: Tensor) -> Tensor:
    """The rows that centred codes `[N, D]` stand for, without their outliers.

    A matrix product gives the bits of `hadamard_` here: sums of 64 small integers are exact in any order, in
    TF32 too, and so is a sum times its scale.
    """
    scales = scale_NG.split([count for count, _ in _blocks(codes_ND.shape[1])], 1)
    pieces = []
    for codes_MB, scale_NC in zip(_split(codes_ND), scales, strict=True):
        width = codes_MB.shape[1]
        values_MB = torch.empty_like(codes_MB)
        torch.mm(codes_MB, _rotation(width, codes_MB.device), out=values_MB)  # `out` keeps autocast away
        pieces.append(values_MB.mul_(scale_NC.reshape(-1, 1)).mul_(width**-0.5))
    return _join(pieces, len(codes_ND)).mul_(_signs(codes_ND.shape[1], codes_ND.device))


@lru_cache
def _rotation(width: int, device: torch.device) -> Tensor:
    """The transform of a block, not scaled: `[B, B]` of ones and minus ones."""
    matrix_BB = torch.ones(1, 1)
    while len(matrix_BB) < width:
        matrix_BB = torch.cat([torch.cat([matrix_BB, matrix_BB], 1), torch.cat([matrix_BB, -matrix_BB], 1)])
    return matrix_BB.to(device)


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


@lru_cache
def _signs(size: int, device: torch.device) -> Tensor:
    repeats = -(-size // BLOCK)
    return torch.tensor(signs(), dtype=torch.float32, device=device).repeat(repeats)[:size]
