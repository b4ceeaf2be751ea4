"""Cut a coded reply into its samples without decoding it, so that the cache holds what crossed the wire.

A payload of N rows consists of planes, each with a fixed number of bytes per token: int8 has a plane of
scales and one of codes. A codec whose layout is not known here is stored decoded.

N = tokens, D = hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tightbeam.common.wire.codecs import codec, lossless

__all__ = ["cut_rows", "decode_rows", "encode_rows", "storage_codec"]

_PLANES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "fp32": lambda d: (4 * d,),
    "bf16": lambda d: (2 * d,),
    "int8": lambda d: (4, d),
}


def storage_codec(wire_codec: str, dtype: torch.dtype, hidden_size: int) -> str:
    """The smaller of what crossed the wire and what loses nothing in `dtype`."""
    plain = lossless(dtype)
    candidates = [wire_codec, plain] if wire_codec in _PLANES else [plain]
    return min(candidates, key=lambda name: codec(name).num_bytes((1, hidden_size)))


def cut_rows(name: str, payload: Tensor, shape_ND: tuple[int, int], start: int, stop: int) -> Tensor:
    """The payload of rows `start` to `stop` of a payload of N rows; uint8."""
    tokens, width = shape_ND
    pieces, offset = [], 0
    for num_bytes in _PLANES[name](width):
        pieces.append(payload[offset + start * num_bytes : offset + stop * num_bytes])
        offset += tokens * num_bytes
    return torch.cat(pieces)


def encode_rows(name: str, hidden_ND: Tensor) -> Tensor:
    """Code rows that were decoded from another codec."""
    return codec(name).encode(hidden_ND)


def decode_rows(name: str, payload: bytes, num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """The rows of one sample, `[num_tokens, D]`; `CodecError` when the payload does not fit."""
    return codec(name).decode(
        torch.frombuffer(bytearray(payload), dtype=torch.uint8), (num_tokens, width), dtype
    )
