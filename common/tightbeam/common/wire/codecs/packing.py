"""Codes of four and five bits without a gap: two nibbles to a byte, and the fifth bits eight to a byte.

Halves and eighths of a row are laid over each other, so packing is a few operations on whole slices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pack", "packed_widths", "unpack"]


def packed_widths(size: int, bits: int) -> tuple[int, ...]:
    """Bytes of a row of `size` codes in each plane."""
    assert bits in (4, 5)
    return (_ceil_div(size, 2),) if bits == 4 else (_ceil_div(size, 2), _ceil_div(size, 8))


def pack(codes_ND: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Planes of uint8: the low nibbles `[N, D/2]` and, for five bits, the high ones `[N, D/8]`.

    With h = D/2 rounded up, byte j of a row holds the nibble of code j and, four bits higher, of code j + h.
    With e = D/8 rounded up, bit i of byte j is the fifth bit of code j + i * e. Missing codes are zero.
    """
    nibbles = _overlay(codes_ND & 15, 2)
    return (nibbles,) if bits == 4 else (nibbles, _overlay(codes_ND >> 4, 8))


def unpack(planes: Sequence[Tensor], size: int) -> Tensor:
    """Inverse of `pack`: codes `[N, D]`, uint8."""
    codes_ND, *high = (
        _spread(plane, per_byte)[:, :size] for plane, per_byte in zip(planes, (2, 8), strict=False)
    )
    return codes_ND | high[0] << 4 if high else codes_ND


def _overlay(codes_ND: Tensor, per_byte: int) -> Tensor:
    width, step = _ceil_div(codes_ND.shape[1], per_byte), 8 // per_byte
    padded = torch.nn.functional.pad(codes_ND, (0, width * per_byte - codes_ND.shape[1]))
    out = padded[:, :width].clone()
    for index in range(1, per_byte):
        out |= padded[:, index * width : (index + 1) * width] << index * step
    return out


def _spread(bytes_NW: Tensor, per_byte: int) -> Tensor:
    step = 8 // per_byte
    mask = (1 << step) - 1
    return torch.cat([bytes_NW >> index * step & mask for index in range(per_byte)], 1)


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)
