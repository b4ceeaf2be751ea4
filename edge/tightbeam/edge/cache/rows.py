"""One sample's entry: its rows of a reply, as they crossed the wire where that is the smaller form.

An entry is one byte for the dtype that the cloud answered in, and the coded rows. A payload of N rows has its
codec's planes, each with a fixed number of bytes per token, so a reply is cut into samples without
decoding it.

N = tokens, D = hidden size.
"""

import torch
from torch import Tensor

from tightbeam.common.errors import CodecError
from tightbeam.common.wire.codecs import codec, lossless
from tightbeam.edge.cache.keys import Scope

__all__ = ["entry_is_sound", "pack_entry", "storage_codec", "unpack_entry"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def storage_codec(wire_codec: str, dtype: torch.dtype, width: int) -> str:
    """The smaller of what crossed the wire and what loses nothing in the reply's dtype."""
    return min((wire_codec, lossless(dtype)), key=lambda name: codec(name).num_bytes((1, width)))


def pack_entry(wire_codec: str, payload: Tensor, reply_ND: Tensor, start: int, stop: int) -> bytes:
    """The entry of rows `start` to `stop` of a reply, given coded (uint8) and decoded."""
    stored = storage_codec(wire_codec, reply_ND.dtype, reply_ND.shape[1])
    if stored == wire_codec:
        rows = _cut(stored, payload, reply_ND.shape[0], reply_ND.shape[1], start, stop)
    else:
        rows = codec(stored).encode(reply_ND[start:stop])
    return bytes([_DTYPES.index(reply_ND.dtype)]) + rows.numpy().tobytes()


def unpack_entry(wire_codec: str, entry: bytes, num_tokens: int, width: int) -> Tensor:
    """The rows `[num_tokens, D]` in the dtype of the reply; `CodecError` when the entry does not fit."""
    if not entry or entry[0] >= len(_DTYPES):
        raise CodecError("A cache entry is malformed.")
    dtype = _DTYPES[entry[0]]
    rows = torch.frombuffer(bytearray(entry[1:]), dtype=torch.uint8)
    return codec(storage_codec(wire_codec, dtype, width)).decode(rows, (num_tokens, width), dtype)


def entry_is_sound(scope: Scope, entry: bytes) -> bool:
    """Whether an entry holds no NaN or Inf, in its hidden states or its taps.

    Cut activations, which mode `side` keeps beside its answers, came from no cloud and count as sound.
    """
    parts, widths = [entry], [scope.hidden_size]
    if scope.taps:
        parts, offset = [], 0
        while offset < len(entry):
            size = int.from_bytes(entry[offset : offset + 4], "little")
            parts.append(entry[offset + 4 : offset + 4 + size])
            offset += 4 + size
        widths += [int(scope.taps[0].rpartition(" ")[2])] * (len(scope.taps) - 1)
        if offset != len(entry) or len(parts) != len(widths):
            return True
    for part, width in zip(parts, widths, strict=True):
        if not part or part[0] >= len(_DTYPES):
            return True
        row_bytes = codec(storage_codec(scope.codec_down, _DTYPES[part[0]], width)).num_bytes((1, width))
        num_tokens, rest = divmod(len(part) - 1, row_bytes)
        if rest:
            return True
        if not bool(unpack_entry(scope.codec_down, part, num_tokens, width).isfinite().all()):
            return False
    return True


def _cut(name: str, payload: Tensor, tokens: int, width: int, start: int, stop: int) -> Tensor:
    pieces, offset = [], 0
    for num_bytes in codec(name).planes(width):
        pieces.append(payload[offset + start * num_bytes : offset + stop * num_bytes])
        offset += tokens * num_bytes
    return torch.cat(pieces)
