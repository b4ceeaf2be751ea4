"""Sample keys and digests of a delta-coded forward, as its header holds them.

Fixed sizes, one after the other, so that their bytes are known before a run: 16 of a key and 8 of each
digest per segment. Zeros stand for none. A direction without digests is coded alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.delta import CHECK_BYTES, KEY_BYTES, WHOLE, Bases, Samples, checks_of
from tightbeam.proto.backbone_pb2 import FORWARD, StepRequest

__all__ = ["BASE", "DeltaHeader", "key_bytes"]

BASE = "base"  # the tensor that brings the bases of the reply along when the cloud does not hold them


def key_bytes(header: StepRequest) -> int:
    """Bytes of keys and digests; they count as payload, as what the codecs put out does."""
    return len(header.sample_keys) + len(header.bases_up) + len(header.bases_down)


@dataclass(frozen=True, slots=True)
class DeltaHeader:
    """What a request says about its samples and their bases."""

    samples: Samples
    up: tuple[bytes, ...] | None  # digests [S]; None: coded alone
    down: tuple[bytes, ...] | None

    @classmethod
    def read(cls, header: StepRequest, size: int) -> Self | None:
        """None for a request without samples; `ProtocolError` for one that contradicts itself."""
        if not key_bytes(header):
            if any(spec.name == BASE for spec in header.tensors):
                raise ProtocolError("A request brings bases along and names none.")
            return None
        if header.kind != FORWARD or not header.keep:
            raise ProtocolError("Only a forward whose backward follows has samples to remember.")
        count = len(header.lengths)
        keys = _split(header.sample_keys, KEY_BYTES, count)
        named = [key for key in keys if key]
        if len(set(named)) < len(named):
            raise ProtocolError("A request names a sample twice.")
        up, down = (
            _split(field, CHECK_BYTES, count) if field else None
            for field in (header.bases_up, header.bases_down)
        )
        for checks in filter(None, (up, down)):
            if any(check and not key for key, check in zip(keys, checks, strict=True)):
                raise ProtocolError("A request names a base of a sample that it does not name.")
        if up is None and down is None:
            raise ProtocolError("A request names samples and codes neither direction against them.")
        brought = [spec for spec in header.tensors if spec.name == BASE]
        if brought and (down is None or any(spec.codec != WHOLE for spec in brought)):
            raise ProtocolError(f"Bases come along for the reply only, and in {WHOLE}.")
        return cls(Samples(keys, tuple(header.lengths), size), up, down)

    @staticmethod
    def write(header: StepRequest, samples: Samples, up: Bases | None, down: Bases | None) -> None:
        """Name samples and bases in a request."""
        header.sample_keys = _join(samples.keys, KEY_BYTES)
        header.bases_up = b"" if up is None else _join(checks_of(up), CHECK_BYTES)
        header.bases_down = b"" if down is None else _join(checks_of(down), CHECK_BYTES)


def _join(parts: Sequence[bytes], size: int) -> bytes:
    return b"".join(part or bytes(size) for part in parts)


def _split(field: bytes, size: int, count: int) -> tuple[bytes, ...]:
    if len(field) != size * count:
        raise ProtocolError(f"Keys or digests of {len(field)} bytes do not fit {count} segments.")
    parts = (field[start : start + size] for start in range(0, len(field), size))
    return tuple(part if any(part) else b"" for part in parts)
