"""Delta coding: send how far a sample's activations moved since they were last sent. Sans-IO.

While the bottom trains, a sample's activations change little from epoch to epoch. Both ends keep the value
that the receiver last decoded, and the quantised difference to it crosses (AQ-SGD, arXiv 2206.01299): its
error is relative to the change, and what one quantisation missed is in the next difference. The first delta
of a sample is against zeros, so there is one kind of message.

Each segment names its base by a digest of the base's bytes: two ends that disagree, for whatever reason,
cannot go on unnoticed. The receiver then raises `UnknownBaseError`, the sender forgets and sends against
zeros. The receiver keeps the base of the last delta beside its result, so that a step that is sent again
decodes to the same values. Bases are bfloat16 and decoded on the CPU, where every machine gets the same bits.

S = segments, N = rows of all segments, D = hidden size.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightbeam.common.errors import CodecError, ProtocolError, UnknownBaseError
from tightbeam.common.wire.codecs import codec

__all__ = ["CHECK_BYTES", "KEY_BYTES", "Delta", "DeltaDecoder", "DeltaEncoder"]

KEY_BYTES = 16  # of a sample's key, which only the edge understands
CHECK_BYTES = 8  # of a base's digest: an accident passes once in 2^64, and a sender can only fool itself
_STATE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Delta:
    """One tensor's message: per segment a sample key and a base's digest, and one payload for all rows.

    An empty key is a sample that is not to be remembered; an empty base means zeros.
    """

    codec: str
    keys: tuple[bytes, ...]  # [S]
    bases: tuple[bytes, ...]  # [S]
    payload: Tensor

    @property
    def num_bytes(self) -> int:
        """Payload, keys and digests."""
        return self.payload.numel() + sum(map(len, self.keys)) + sum(map(len, self.bases))


class _Store:
    """The latest versions of each sample, least recently used first; bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._versions: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()
        self.num_bytes = 0

    def versions(self, key: bytes) -> tuple[Tensor, ...]:
        """Oldest first; empty when the sample is unknown or was evicted."""
        return self._versions.get(key, ())

    def put(self, key: bytes, versions: tuple[Tensor, ...]) -> None:
        """Replace a sample's versions and evict others for them; what never fits is not kept."""
        self.drop(key)
        if not key:
            return
        self._versions[key] = versions
        self.num_bytes += _num_bytes(versions)
        while self.num_bytes > self._max_bytes:
            self.drop(next(iter(self._versions)))

    def drop(self, key: bytes) -> None:
        """Forget a sample."""
        self.num_bytes -= _num_bytes(self._versions.pop(key, ()))

    def items(self) -> Iterator[tuple[bytes, tuple[Tensor, ...]]]:
        """Least recently used first."""
        yield from self._versions.items()


class DeltaEncoder:
    """The sending end. Not thread-safe: deltas must be decoded in the order in which they were made."""

    def __init__(self, codec_name: str, max_bytes: int) -> None:
        self._codec = codec(codec_name)
        self._store = _Store(max_bytes)

    @property
    def state_bytes(self) -> int:
        """Bytes of the bases that are kept."""
        return self._store.num_bytes

    def encode(self, rows_ND: Tensor, lengths: Sequence[int], keys: Sequence[bytes]) -> tuple[Delta, Tensor]:
        """The message, and what the other end decodes, bfloat16 `[N, D]` on the CPU.

        A key that comes twice in one batch is remembered once. Raises `NonFiniteError` and then remembers
        what it did before.
        """
        keys = _without_repeats(keys)
        segments = rows_ND.detach().cpu().float().split(list(lengths))
        bases = [self._base(key, rows) for key, rows in zip(keys, segments, strict=True)]
        moved_ND = torch.cat(
            [rows - _or_zeros(base, rows) for rows, base in zip(segments, bases, strict=True)]
        )
        payload = self._codec.encode(moved_ND)
        decoded_ND = _advance(self._codec.name, payload, bases, lengths, rows_ND.shape[1])
        for key, rows in zip(keys, decoded_ND.split(list(lengths)), strict=True):
            self._store.put(key, (rows.clone(),))
        checks = tuple(b"" if base is None else _check(base) for base in bases)
        return Delta(self._codec.name, keys, checks, payload), decoded_ND

    def forget(self, keys: Sequence[bytes]) -> None:
        """Send these samples against zeros next time: the other end does not know their bases."""
        for key in keys:
            self._store.drop(key)

    def state_dict(self) -> dict[str, Tensor]:
        """Bases by name, for a safetensors file; the names keep the order of use."""
        return {f"{n:08d}.{key.hex()}": rows for n, (key, (rows,)) in enumerate(self._store.items())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state. If the other end has moved on meanwhile, its digests tell."""
        for name in sorted(state):
            self._store.put(bytes.fromhex(name.partition(".")[2]), (state[name].to(_STATE),))

    def _base(self, key: bytes, rows: Tensor) -> Tensor | None:
        return next((base for base in self._store.versions(key) if base.shape == rows.shape), None)


class DeltaDecoder:
    """The receiving end; keeps each sample's last value and the one before."""

    def __init__(self, max_bytes: int) -> None:
        self._store = _Store(max_bytes)

    @property
    def state_bytes(self) -> int:
        """Bytes of the versions that are kept."""
        return self._store.num_bytes

    def decode(self, delta: Delta, lengths: Sequence[int], size: int) -> Tensor:
        """The rows, bfloat16 `[N, D]`; nothing is remembered unless all segments decode.

        Raises:
            UnknownBaseError: A base is not held; the sender must forget these samples.
            ProtocolError: Keys or digests are malformed.
            CodecError: The payload is.
        """
        _check_shape(delta, lengths)
        bases = [
            self._base(key, check, (length, size))
            for key, check, length in zip(delta.keys, delta.bases, lengths, strict=True)
        ]
        rows_ND = _advance(delta.codec, delta.payload, bases, lengths, size)
        for key, base, rows in zip(delta.keys, bases, rows_ND.split(list(lengths)), strict=True):
            self._store.put(key, (rows.clone(),) if base is None else (base, rows.clone()))
        return rows_ND

    def _base(self, key: bytes, check: bytes, shape: tuple[int, int]) -> Tensor | None:
        if not check:
            return None
        for base in self._store.versions(key):
            if base.shape == shape and _check(base) == check:
                return base
        raise UnknownBaseError(
            "The cloud does not hold the values that a delta is against.",
            cure="The edge sends whole values; if this repeats, raise the cloud's memory for deltas.",
        )


def _advance(
    name: str, payload: Tensor, bases: Sequence[Tensor | None], lengths: Sequence[int], size: int
) -> Tensor:
    """Bases plus the decoded difference, rounded to what both ends keep."""
    moved_ND = codec(name).decode(payload, (sum(lengths), size), torch.float32)
    pieces = [
        _or_zeros(base, rows) + rows for base, rows in zip(bases, moved_ND.split(list(lengths)), strict=True)
    ]
    rows_ND = torch.cat(pieces).to(_STATE)
    if not bool(rows_ND.isfinite().all()):
        raise CodecError("A delta leads to values that are not finite.")
    return rows_ND


def _check_shape(delta: Delta, lengths: Sequence[int]) -> None:
    if not len(delta.keys) == len(delta.bases) == len(lengths):
        raise ProtocolError("A delta must have one key and one base per segment.")
    if any(len(key) not in (0, KEY_BYTES) for key in delta.keys):
        raise ProtocolError(f"A sample key has {KEY_BYTES} bytes, or none.")
    if any(len(check) not in (0, CHECK_BYTES) for check in delta.bases):
        raise ProtocolError(f"A base's digest has {CHECK_BYTES} bytes, or none.")
    if delta.keys != _without_repeats(delta.keys):
        raise ProtocolError("A delta names a sample twice.")


def _without_repeats(keys: Sequence[bytes]) -> tuple[bytes, ...]:
    return tuple(b"" if key in keys[:index] else key for index, key in enumerate(keys))


def _or_zeros(base: Tensor | None, rows: Tensor) -> Tensor:
    return torch.zeros_like(rows) if base is None else base.float()


def _check(base: Tensor) -> bytes:
    return hashlib.blake2b(base.contiguous().view(torch.uint8).numpy().data, digest_size=CHECK_BYTES).digest()


def _num_bytes(versions: tuple[Tensor, ...]) -> int:
    return sum(version.numel() * version.element_size() for version in versions)
