"""Step messages as sealed records, sans-IO: messages in, records out, and back.

A message is a header record (protobuf `StepRequest` or `StepReply`) followed by its tensors' payloads in
chunks of at most 1 MiB, each chunk one record. Every chunk's associated data holds the header's digest and
the chunk's place, so a record moved anywhere else does not open. Payloads are decrypted straight into the
memory of the tensors they become.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from tightbeam.common.devices import DTYPES
from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.codecs import codec
from tightbeam.common.wire.records import (
    CHUNK_BYTES,
    TAG_BYTES,
    Opener,
    Sealer,
    chunk_context,
    header_context,
    header_digest,
)
from tightbeam.proto.backbone_pb2 import StepReply, StepRequest, TensorSpec

__all__ = [
    "Message",
    "MessageReader",
    "decode_tensor",
    "encode_tensor",
    "payload_bytes",
    "seal_message",
    "sealed_sizes",
    "tensor_spec",
]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_TENSORS = 64
_MAX_RANK = 4

Header = TypeVar("Header", StepRequest, StepReply)


def encode_tensor(name: str, tensor: Tensor, codec_name: str, seed: int = 0) -> tuple[TensorSpec, Tensor]:
    """A tensor's spec for the header, and its payload (uint8, CPU); `seed` is for stochastic rounding."""
    return tensor_spec(name, tensor, codec_name), codec(codec_name).encode(tensor, seed=seed)


def tensor_spec(name: str, tensor: Tensor, codec_name: str) -> TensorSpec:
    """What a header says about a tensor."""
    return TensorSpec(name=name, codec=codec_name, shape=tensor.shape, dtype=_NAMES[tensor.dtype])


def decode_tensor(spec: TensorSpec, payload: Tensor) -> Tensor:
    """The tensor of a spec and its payload, on the CPU."""
    return codec(spec.codec).decode(payload, tuple(spec.shape), DTYPES[spec.dtype])


@dataclass(slots=True)
class Message(Generic[Header]):
    """A header with the payloads of `header.tensors`, and what it measured on the wire."""

    header: Header
    payloads: list[Tensor]
    sealed_sizes: list[int] = field(default_factory=list)  # bytes of each record
    seal_s: float = 0.0

    @property
    def payload_bytes(self) -> int:
        """Bytes that the codecs put out."""
        return sum(payload.numel() for payload in self.payloads)

    def has(self, name: str) -> bool:
        """Whether it carries a tensor of that name."""
        return any(spec.name == name for spec in self.header.tensors)

    def tensor(self, name: str) -> Tensor:
        """Decode the tensor of that name; `ProtocolError` when the message has none."""
        return decode_tensor(*self.coded(name))

    def coded(self, name: str) -> tuple[TensorSpec, Tensor]:
        """The tensor of that name as it crossed; `ProtocolError` when the message has none."""
        for spec, payload in zip(self.header.tensors, self.payloads, strict=True):
            if spec.name == name:
                return spec, payload
        raise ProtocolError(f"The message lacks the tensor {name!r}.")


def sealed_sizes(header: bytes, payload_sizes: list[int]) -> list[int]:
    """Bytes of each record of a message, known before it is sealed."""
    sizes = [len(header)]
    for size in payload_sizes:
        sizes += [min(CHUNK_BYTES, size - start) for start in range(0, size, CHUNK_BYTES)]
    return [size + TAG_BYTES for size in sizes]


def seal_message(header: bytes, payloads: list[Tensor], sealer: Sealer) -> Iterator[bytes]:
    """The records of one message, in order; sealed as they are asked for."""
    yield sealer.seal(header, header_context())
    digest = header_digest(header)
    for index, payload in enumerate(payloads):
        memory = payload.numpy().data
        chunks = math.ceil(len(memory) / CHUNK_BYTES)
        for chunk in range(chunks):
            piece = memory[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
            yield sealer.seal(piece, chunk_context(digest, index, chunk, chunks))


class MessageReader(Generic[Header]):
    """Puts the messages of one direction together from their records.

    `admit(header)` is called before any memory is taken for the tensors; what it raises ends the stream.
    """

    def __init__(self, opener: Opener, header_type: type[Header], admit: Callable[[Header], None]) -> None:
        self._opener = opener
        self._header_type: type[Header] = header_type
        self._admit: Callable[[Header], None] = admit
        self._message: Message[Header] | None = None
        self._pending: Iterator[tuple[bytes, memoryview]] = iter(())
        self._next: tuple[bytes, memoryview] = (b"", memoryview(b""))

    @property
    def idle(self) -> bool:
        """Whether no message is under way: a stream that ends now is complete."""
        return self._message is None

    def feed(self, record: bytes) -> Message[Header] | None:
        """Take the next record; returns the message that it completes, if it does.

        Raises:
            IntegrityError: The record does not authenticate.
            ProtocolError: It does, but is not what the protocol says.
        """
        started = time.perf_counter()
        if self._message is None:
            message = self._message = self._begin(record)
        else:
            message = self._message
            context, memory = self._next
            self._opener.open_into(record, context, memory)
        message.sealed_sizes.append(len(record))
        message.seal_s += time.perf_counter() - started
        following = next(self._pending, None)
        if following is not None:
            self._next = following
            return None
        self._message = None
        return message

    def _begin(self, record: bytes) -> Message[Header]:
        plaintext = self._opener.open(record, header_context())
        try:
            header = self._header_type.FromString(plaintext)
        except DecodeError as error:
            raise ProtocolError("A step header is malformed.") from error
        sizes = [payload_bytes(spec) for spec in header.tensors]
        if len(sizes) > _MAX_TENSORS:
            raise ProtocolError(f"A message has {len(sizes)} tensors, more than {_MAX_TENSORS}.")
        self._admit(header)
        payloads = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self._pending = _chunks(header_digest(plaintext), payloads)
        return Message(header, payloads)


def _chunks(digest: bytes, payloads: list[Tensor]) -> Iterator[tuple[bytes, memoryview]]:
    for index, payload in enumerate(payloads):
        memory = payload.numpy().data
        chunks = math.ceil(len(memory) / CHUNK_BYTES)
        for chunk in range(chunks):
            context = chunk_context(digest, index, chunk, chunks)
            yield context, memory[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]


def payload_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor as it crosses; `ProtocolError` for one that cannot."""
    if spec.dtype not in DTYPES:
        raise ProtocolError(f"Tensor {spec.name!r} has the unknown dtype {spec.dtype!r}.")
    if not 1 <= len(spec.shape) <= _MAX_RANK or min(spec.shape) < 1:
        raise ProtocolError(f"Tensor {spec.name!r} has the shape {tuple(spec.shape)}.")
    return codec(spec.codec).num_bytes(tuple(spec.shape))
