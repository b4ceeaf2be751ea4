"""Messages over sealed records: what goes in comes out, in order; nothing hostile gets past the reader."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightbeam.common.errors import CodecError, IntegrityError, ProtocolError, StepTooLargeError
from tightbeam.common.wire.messages import (
    Message,
    MessageReader,
    decode_tensor,
    encode_tensor,
    seal_message,
    sealed_sizes,
)
from tightbeam.common.wire.records import CHUNK_BYTES, TAG_BYTES, Direction, Opener, Sealer, header_context
from tightbeam.proto.backbone_pb2 import FORWARD, StepReply, StepRequest, TensorSpec

_SECRET, _SESSION = bytes(range(32)), bytes(16)


def _pair() -> tuple[Sealer, Opener]:
    return (
        Sealer(_SECRET, _SESSION, Direction.EDGE_TO_CLOUD),
        Opener(_SECRET, _SESSION, Direction.EDGE_TO_CLOUD),
    )


def _reader(
    opener: Opener, admit: Callable[[StepRequest], None] = lambda header: None
) -> MessageReader[StepRequest]:
    return MessageReader(opener, StepRequest, admit)


def _request(step: int, tensors: list[Tensor], codec: str = "fp32") -> tuple[StepRequest, list[Tensor]]:
    coded = [encode_tensor(f"t{i}", tensor, codec) for i, tensor in enumerate(tensors)]
    header = StepRequest(step=step, kind=FORWARD, tensors=[spec for spec, _ in coded])
    return header, [payload for _, payload in coded]


def _feed(reader: MessageReader[StepRequest], records: list[bytes]) -> list[Message[StepRequest]]:
    return [message for record in records if (message := reader.feed(record)) is not None]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.lists(st.sampled_from([1, 3, 250, 1024]), max_size=3), min_size=1, max_size=3),
    codec=st.sampled_from(["fp32", "bf16", "int8"]),
)
def test_messages_come_out_as_they_went_in(sizes: list[list[int]], codec: str) -> None:
    """One to some chunks each, with and without tensors; `sealed_sizes` told every record's length before."""
    sealer, opener = _pair()
    reader = _reader(opener)
    for step, rows in enumerate(sizes):
        tensors = [torch.randn(n, 600, generator=torch.Generator().manual_seed(n)) for n in rows]
        header, payloads = _request(step, tensors, codec)
        plain = header.SerializeToString()
        records = list(seal_message(plain, payloads, sealer))
        assert [len(record) for record in records] == sealed_sizes(plain, [p.numel() for p in payloads])
        assert all(len(record) <= CHUNK_BYTES + TAG_BYTES for record in records)
        assert reader.idle
        for record in records[:-1]:
            assert reader.feed(record) is None
            assert not reader.idle
        message = reader.feed(records[-1])
        assert message is not None
        assert reader.idle
        assert message.header == header
        assert message.sealed_sizes == [len(record) for record in records]
        assert message.payload_bytes == sum(p.numel() for p in payloads)
        for i, payload in enumerate(payloads):
            assert torch.equal(message.payloads[i], payload)
            assert message.has(f"t{i}")
            assert torch.equal(message.tensor(f"t{i}"), decode_tensor(header.tensors[i], payload))


def test_a_tensor_that_is_not_there_is_named() -> None:
    sealer, opener = _pair()
    header, payloads = _request(1, [torch.ones(2, 2)])
    (message,) = _feed(_reader(opener), list(seal_message(header.SerializeToString(), payloads, sealer)))
    assert not message.has("grad_hidden")
    with pytest.raises(ProtocolError, match="lacks the tensor 'grad_hidden'"):
        message.tensor("grad_hidden")


def test_a_refused_header_takes_no_memory() -> None:
    """It announces a terabyte; the refusal comes before the allocation, which would fail."""
    sealer, opener = _pair()
    seen: list[StepRequest] = []

    def refuse(header: StepRequest) -> None:
        seen.append(header)
        raise StepTooLargeError("Too large.")

    spec = TensorSpec(name="hidden", codec="fp32", shape=[1 << 30, 1 << 10], dtype="float32")
    header = StepRequest(step=3, kind=FORWARD, tensors=[spec])
    (record,) = seal_message(header.SerializeToString(), [], sealer)
    with pytest.raises(StepTooLargeError):
        _reader(opener, refuse).feed(record)
    assert seen == [header]


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        (TensorSpec(codec="fp32", shape=[2, 2], dtype="float64"), ProtocolError, "unknown dtype 'float64'"),
        (TensorSpec(codec="fp32", shape=[2, 2]), ProtocolError, "unknown dtype"),
        (TensorSpec(codec="fp32", shape=[], dtype="float32"), ProtocolError, "the shape"),
        (TensorSpec(codec="fp32", shape=[3, 0], dtype="float32"), ProtocolError, "the shape"),
        (TensorSpec(codec="fp32", shape=[1] * 5, dtype="float32"), ProtocolError, "the shape"),
        (TensorSpec(codec="zip", shape=[2, 2], dtype="float32"), CodecError, "Unknown codec"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(spec: TensorSpec, error: type[Exception], words: str) -> None:
    sealer, opener = _pair()
    (record,) = seal_message(StepRequest(tensors=[spec]).SerializeToString(), [], sealer)
    with pytest.raises(error, match=words):
        _reader(opener).feed(record)


def test_too_many_tensors_are_refused() -> None:
    sealer, opener = _pair()
    spec = TensorSpec(codec="fp32", shape=[1], dtype="float32")
    (record,) = seal_message(StepRequest(tensors=[spec] * 65).SerializeToString(), [], sealer)
    with pytest.raises(ProtocolError, match="65 tensors, more than 64"):
        _reader(opener).feed(record)


@settings(max_examples=300, deadline=None)
@given(plain=st.binary(max_size=200), header_type=st.sampled_from([StepRequest, StepReply]))
def test_random_bytes_sealed_well_never_crash(
    plain: bytes, header_type: type[StepRequest] | type[StepReply]
) -> None:
    """A peer with the keys may send anything: the reader answers with its own errors or a message."""
    sealer, opener = _pair()

    def bounded(header: StepRequest | StepReply) -> None:
        if sum(len(spec.shape) for spec in header.tensors) > 0:
            raise ProtocolError("Not admitted.")  # a size that this test must not allocate

    reader = MessageReader(opener, header_type, bounded)  # type: ignore[type-var]  # either of its two types
    try:
        message = reader.feed(sealer.seal(plain, header_context()))
    except (ProtocolError, CodecError):
        return
    assert message is not None
    assert list(message.header.tensors) == []


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 2**64 - 1), max_size=6),
    codec=st.sampled_from(["fp32", "int8", "int4", "", "x"]),
    dtype=st.sampled_from(["float32", "bfloat16", "object"]),
)
def test_hostile_shapes_only_meet_the_admission(shape: list[int], codec: str, dtype: str) -> None:
    """No announced size, however large, is computed wrongly or allocated before `admit` has seen it."""
    sealer, opener = _pair()

    def refuse(header: StepRequest) -> None:
        raise StepTooLargeError("Too large.")

    header = StepRequest(tensors=[TensorSpec(codec=codec, shape=shape, dtype=dtype)])
    with pytest.raises((ProtocolError, CodecError, StepTooLargeError)):
        _reader(opener, refuse).feed(sealer.seal(header.SerializeToString(), header_context()))


def _two_messages() -> tuple[list[bytes], list[bytes], Opener]:
    sealer, opener = _pair()
    made = [_request(step, [torch.full((700, 600), float(step))]) for step in (1, 2)]
    first, second = ([*seal_message(h.SerializeToString(), p, sealer)] for h, p in made)
    assert len(first) == 3  # a header and two chunks
    return first, second, opener


@pytest.mark.parametrize("order", [[0, 2], [0, 1, 1], [1], [0, 2, 1], [0, 1, 3], [3, 4, 5]])
def test_records_out_of_place_do_not_open(order: list[int]) -> None:
    first, second, opener = _two_messages()
    records, reader = [*first, *second], _reader(opener)
    with pytest.raises(IntegrityError):
        _feed(reader, [records[i] for i in order])
    with pytest.raises(IntegrityError):  # and the session is dead
        reader.feed(records[0])


def test_records_in_order_do() -> None:
    first, second, opener = _two_messages()
    messages = _feed(_reader(opener), [*first, *second])
    assert [message.header.step for message in messages] == [1, 2]
    assert bool((messages[1].tensor("t0") == 2.0).all())
