"""Codes of four and five bits without a gap: two nibbles to a byte, and the fifth bits eight to a byte.

Halves and eighths of a row are laid over each other, so packing is a few operations on whole slices.
"""

import torch
from torch import Tensor

__all__ = ["num_packed_bytes", "pack", "unpack"]


def num_packed_bytes(size: int, bits: int) -> int:
    """Bytes of one row of `size` codes."""
    return _ceil_div(size, 2) + (_ceil_div(size, 8) if bits == 5 else 0)


def pack(codes_ND: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Planes of uint8: the low nibbles `[N, D/2]` and, for five bits, the high ones `[N, D/8]`.

    With h = D/2 rounded up, byte j of a row holds the nibble of code j and, four bits higher, of code j + h.
    With e = D/8 rounded up, bit i of byte j is the fifth bit of code j + i * e. Missing codes are zero.
    """
    assert bits in (4, 5)
    nibbles = _overlay(codes_ND & 15, 2)
    return (nibbles,) if bits == 4 else (nibbles, _overlay(codes_ND >> 4, 8))


def unpack(packed: Tensor, num_rows: int, size: int, bits: int) -> Tensor:
    """Inverse of `pack`: codes `[N, D]`, uint8, from the planes one after the other."""
    num_nibble_bytes = num_rows * _ceil_div(size, 2)
    codes_ND = _spread(packed[:num_nibble_bytes].view(num_rows, -1), 2)[:, :size]
    if bits == 5:
        codes_ND = codes_ND | _spread(packed[num_nibble_bytes:].view(num_rows, -1), 8)[:, :size] << 4
    return codes_ND


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
