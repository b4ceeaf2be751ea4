"""Delta coding: send how far a sample's activations moved since they were last sent. Sans-IO.

While the bottom trains, a sample's activations change little from epoch to epoch. Both ends keep the value
that the receiver last decoded, and the quantised difference to it crosses (AQ-SGD, arXiv 2206.01299): its
error is relative to the change, and what one quantisation missed is in the next difference. The first delta
of a sample is against zeros, so there is one kind of message.

One end leads: it takes the `latest` value that it keeps of each sample and names it by its digest. The other
follows: it looks up what was named (`find`), so two ends that disagree, for whatever reason, cannot go on
unnoticed. The leader may be sender or receiver. A follower remembers the base beside the result: a step that
is sent again finds it, and comes out the same. Bases are bfloat16 and coded on the CPU, where every machine
gets the same bits.

S = segments, N = rows of all segments, D = hidden size.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from cryptography.hazmat.primitives.poly1305 import Poly1305
from torch import Tensor

from tightbeam.common.errors import CodecError, UnknownBaseError
from tightbeam.common.wire.codecs import Codec, codec
from tightbeam.common.wire.codecs.base import CACHED_VALUES, check_length, planes_of

__all__ = [
    "CHECK_BYTES",
    "KEY_BYTES",
    "OVERHEAD_BYTES",
    "WHOLE",
    "Base",
    "BaseStore",
    "Bases",
    "Samples",
    "checks_of",
    "decode_delta",
    "encode_delta",
]

KEY_BYTES = 16  # of a sample's key, which only the edge understands
CHECK_BYTES = 8  # of a base's digest: an accident passes once in 2^64, and a sender can only fool itself
OVERHEAD_BYTES = 1024  # counted for each base besides its rows, or samples of one token would cost nothing
WHOLE = "bf16"  # the codec in which bases themselves cross without loss
_STATE = torch.bfloat16
_CHECK_KEY = b"tightbeam/delta base/1".ljust(32, b".")  # public: a check against accidents, not a seal


@dataclass(frozen=True, slots=True)
class Samples:
    """Which samples the rows of a step are."""

    keys: tuple[bytes, ...]  # [S]; an empty one is not to be remembered
    lengths: tuple[int, ...]  # [S]
    size: int  # D

    @classmethod
    def of(cls, keys: Sequence[bytes], lengths: Sequence[int], size: int) -> Self:
        """A key that comes twice is kept once."""
        once = tuple(b"" if key in keys[:index] else key for index, key in enumerate(keys))
        return cls(once, tuple(lengths), size)


@dataclass(frozen=True, slots=True)
class Base:
    """What both ends hold of one sample."""

    rows: Tensor  # bfloat16 [n, D], CPU
    check: bytes  # its digest

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """A private copy of decoded rows, and their digest."""
        rows = rows.to(_STATE).clone()
        content = rows.view(torch.uint8).numpy().data
        return cls(rows, Poly1305.generate_tag(_CHECK_KEY, content)[:CHECK_BYTES])

    @property
    def num_bytes(self) -> int:
        """What it takes to keep."""
        return self.rows.numel() * self.rows.element_size() + OVERHEAD_BYTES


Bases = tuple[Base | None, ...]
"""One per segment; None is zeros."""


def checks_of(bases: Bases) -> tuple[bytes, ...]:
    """The digests that name bases; empty for zeros."""
    return tuple(b"" if base is None else base.check for base in bases)


class BaseStore:
    """The last versions of each sample, least recently used first; bounded in bytes. Not thread-safe."""

    def __init__(self, max_bytes: float = float("inf")) -> None:
        self._max_bytes = max_bytes
        self._versions: OrderedDict[bytes, tuple[Base, ...]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._versions)

    def latest(self, samples: Samples) -> Bases:
        """What the leader codes against."""
        return tuple(
            next((base for base in reversed(self._of(key)) if base.rows.shape == shape), None)
            for key, shape in _shapes(samples)
        )

    def items(self) -> Iterator[tuple[bytes, Tensor]]:
        """Keys and their latest rows, the one used longest ago first."""
        return ((key, versions[-1].rows) for key, versions in self._versions.items())

    def find(self, samples: Samples, checks: Sequence[bytes]) -> Bases:
        """What the leader named.

        Raises `UnknownBaseError` when one is not held (evicted, restarted, drifted): the leader must send it.
        """
        return tuple(
            self._find(key, check, shape)
            for (key, shape), check in zip(_shapes(samples), checks, strict=True)
        )

    def remember(self, samples: Samples, decoded_ND: Tensor, beside: Bases | None = None) -> None:
        """Keep the values of a step, and evict others for them; a follower keeps their bases `beside`."""
        earlier = beside or (None,) * len(samples.keys)
        for key, base, rows in zip(samples.keys, earlier, decoded_ND.split(samples.lengths), strict=True):
            if key:
                now = Base.of(rows)
                self._put(key, (now,) if base is None else (base, now))

    def drop_oldest(self) -> None:
        """Forget the sample that was used longest ago, if there is any."""
        self._drop(next(iter(self._versions), b""))

    def _of(self, key: bytes) -> tuple[Base, ...]:
        return self._versions.get(key, ())

    def _find(self, key: bytes, check: bytes, shape: tuple[int, int]) -> Base | None:
        if not check:
            return None
        for base in self._of(key):
            if base.check == check and base.rows.shape == shape:
                return base
        raise UnknownBaseError(
            "The cloud does not hold the values that a delta is against.",
            cure="The edge sends whole values; if this repeats, raise the cloud's --delta-bytes.",
        )

    def _put(self, key: bytes, versions: tuple[Base, ...]) -> None:
        self._drop(key)
        self._versions[key] = versions
        self.num_bytes += _num_bytes(versions)
        while self.num_bytes > self._max_bytes:
            self.drop_oldest()

    def _drop(self, key: bytes) -> None:
        self.num_bytes -= _num_bytes(self._versions.pop(key, ()))


def encode_delta(
    codec_name: str, rows_ND: Tensor, bases: Bases, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The payload of `rows_ND` less their bases, and what the other end decodes, bfloat16 on the CPU.

    Raises `NonFiniteError`.
    """
    coder, rows_ND = codec(codec_name), rows_ND.detach().cpu()
    payload = torch.empty(coder.num_bytes(rows_ND.shape), dtype=torch.uint8)
    decoded_ND = torch.empty(rows_ND.shape, dtype=_STATE)
    planes = planes_of(coder, payload, rows_ND.shape)
    for rows, base_ND in _pieces(bases, lengths, rows_ND.shape[1]):
        part = coder.encode(rows_ND[rows].float() - base_ND)
        for plane, coded in zip(planes, planes_of(coder, part, base_ND.shape), strict=True):
            plane[rows] = coded
        decoded_ND[rows] = _decode(coder, part, base_ND)
    return payload, decoded_ND


def decode_delta(codec_name: str, payload: Tensor, bases: Bases, lengths: Sequence[int], size: int) -> Tensor:
    """Bases plus the decoded difference, rounded to what both ends keep: bfloat16 `[N, D]`.

    Raises `CodecError` for a payload that does not decode, or leads to values that are not finite.
    """
    coder, shape = codec(codec_name), (sum(lengths), size)
    check_length(coder, payload, shape)
    decoded_ND = torch.empty(shape, dtype=_STATE)
    planes = planes_of(coder, payload, shape)
    for rows, base_ND in _pieces(bases, lengths, size):
        part = torch.cat([plane[rows].flatten() for plane in planes])
        decoded_ND[rows] = _decode(coder, part, base_ND)
    return decoded_ND


def _decode(coder: Codec, payload: Tensor, base_ND: Tensor) -> Tensor:
    rows_ND = (base_ND + coder.decode(payload, base_ND.shape, torch.float32)).to(_STATE)
    rows_ND += 0.0  # -0.0 has other bits, and would not come through as a whole value
    if not all(bound.isfinite() for bound in torch.aminmax(rows_ND)):
        raise CodecError("A delta leads to values that are not finite.")
    return rows_ND


def _pieces(bases: Bases, lengths: Sequence[int], size: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of whole segments, no more than a core's cache holds, and their bases as float32."""
    start, stop, parts = 0, 0, list[Tensor]()
    for base, length in zip(bases, lengths, strict=True):
        if parts and (stop + length - start) * size > CACHED_VALUES:
            yield slice(start, stop), torch.cat(parts).float()
            start, parts = stop, []
        parts.append(torch.zeros(length, size, dtype=_STATE) if base is None else base.rows)
        stop += length
    if parts:
        yield slice(start, stop), torch.cat(parts).float()


def _shapes(samples: Samples) -> Iterable[tuple[bytes, tuple[int, int]]]:
    return ((key, (n, samples.size)) for key, n in zip(samples.keys, samples.lengths, strict=True))


def _num_bytes(versions: tuple[Base, ...]) -> int:
    return sum(version.num_bytes for version in versions)
