"""How the messages of a secure aggregation become bytes, and back.

A message is its kind and a list of length-prefixed fields; lists nest. There is one way only to write each,
so that bytes can be hashed and signed, and parsing is strict: a length that does not fit, a field too many or
a name twice is a ProtocolError.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from struct import error
from typing import ClassVar, Self

from tightbeam.common.errors import ProtocolError

__all__ = ["PROTOCOL", "Message", "digest", "fields", "join", "names_of", "split"]

PROTOCOL = "tightbeam secagg/2"


def fields(label: str, *values: bytes) -> bytes:
    """Join a label and values so that no two lists give the same bytes: each has its length before it."""
    return join((f"{PROTOCOL} {label}".encode(), *values))


def digest(label: str, *values: bytes) -> bytes:
    """SHA-256 over labelled fields."""
    return hashlib.sha256(fields(label, *values)).digest()


def join(values: Iterable[bytes]) -> bytes:
    """Write values one after the other, each with its length before it."""
    return b"".join(part for value in values for part in (len(value).to_bytes(4), value))


def split(data: bytes) -> list[bytes]:
    """Read what `join` wrote; raises ProtocolError if a length does not fit."""
    values, start = [], 0
    while start < len(data):
        end = start + 4 + int.from_bytes(data[start : start + 4])
        if start + 4 > len(data) or end > len(data):
            raise ProtocolError("A secure aggregation message is cut short.")
        values.append(data[start + 4 : end])
        start = end
    return values


@dataclass(frozen=True, slots=True)
class Message(ABC):
    """Base: bytes are the kind and the fields. Subclasses say how their values become fields, and back."""

    kind: ClassVar[str]

    def to_bytes(self) -> bytes:
        """Serialise; equal messages give equal bytes."""
        return fields(self.kind, *self._fields())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse strictly.

        Raises:
            ProtocolError: other bytes than `to_bytes` of this class gives.

        """
        label, *values = split(data) or [b""]
        if label != f"{PROTOCOL} {cls.kind}".encode():
            raise ProtocolError(f"A secure aggregation message is no {cls.__name__}.")
        try:
            return cls._parse(values)
        except (ValueError, UnicodeDecodeError, error) as wrong:  # a field too few or many, a bad number
            raise ProtocolError(f"A {cls.__name__} of a secure aggregation is malformed.") from wrong

    @abstractmethod
    def _fields(self) -> list[bytes]:
        """Values as bytes, in the order that `_parse` reads."""

    @classmethod
    @abstractmethod
    def _parse(cls, values: list[bytes]) -> Self:
        """Inverse of `_fields`; a ValueError for what it never writes."""


def names_of(values: Iterable[bytes]) -> tuple[str, ...]:
    """Decode names; raises ValueError unless they are sorted, each once."""
    names = tuple(value.decode() for value in values)
    if list(names) != sorted(set(names)):
        raise ValueError("names are sorted and unique")
    return names
