"""One contract for every channel: through memory, through gRPC, and behind a fault injector without faults.

Below it, what a gRPC channel makes of a cloud that lies, and of the errors that gRPC itself has.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest
import torch
from torch import Tensor

from support.in_process import FaultyChannel, InProcessCloud
from tightbeam.common.errors import (
    CloudBusyError,
    CloudUnavailableError,
    IdentityError,
    IntegrityError,
    NonFiniteError,
    ProtocolError,
    StepTooLargeError,
    TightbeamError,
    UsageError,
)
from tightbeam.common.wire.handshake import Session
from tightbeam.common.wire.messages import encode_tensor, seal_message, sealed_sizes
from tightbeam.common.wire.records import Direction, Opener, Sealer
from tightbeam.common.wire.status import status_details
from tightbeam.edge import connect
from tightbeam.edge.link.channel import STEPS_METHOD, Channel, Exchange, GrpcChannel, error_from_rpc
from tightbeam.proto.backbone_pb2 import BACKWARD, FORWARD, StepKind, StepReply, StepRequest


def _request(
    step: int, num_tokens: int = 5, *, kind: StepKind.ValueType = FORWARD, name: str = "hidden"
) -> tuple[StepRequest, list[Tensor]]:
    hidden_ND = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(step))
    spec, payload = encode_tensor(name, hidden_ND, "fp32")
    header = StepRequest(
        step=step, kind=kind, reply_codec="fp32", lengths=[num_tokens], run_starts=[0],
        run_lengths=[num_tokens], tensors=[spec],
    )  # fmt: skip
    return header, [payload]


class ChannelContract:
    """What every `Channel` keeps; a subclass gives the fixture `channel`, with cut 1:2 of the tiny Llama."""

    def test_a_request_gets_its_reply(self, channel: Channel) -> None:
        exchange = channel.submit(*_request(1)).result(timeout=30)
        assert (exchange.reply.header.step, exchange.reply.header.kind) == (1, FORWARD)
        assert exchange.reply.tensor("hidden").shape == (5, 32)
        assert exchange.reply.header.flops > 0

    def test_every_byte_is_counted(self, channel: Channel) -> None:
        header, payloads = _request(2)
        exchange = channel.submit(header, payloads).result(timeout=30)
        moved = exchange.moved
        assert moved.payload_up_bytes == moved.payload_down_bytes == 5 * 32 * 4
        assert moved.sealed_up_bytes == sum(sealed_sizes(header.SerializeToString(), [5 * 32 * 4]))
        assert moved.sealed_down_bytes == sum(exchange.reply.sealed_sizes)
        assert moved.wire_up_bytes > moved.sealed_up_bytes

    def test_several_in_flight_find_their_way(self, channel: Channel) -> None:
        pending = {step: channel.submit(*_request(step, step + 1)) for step in range(10, 18)}
        for step, future in pending.items():
            reply = future.result(timeout=30).reply
            assert reply.header.step == step
            assert reply.tensor("hidden").shape == (step + 1, 32)

    def test_a_failure_is_an_answer_and_the_stream_goes_on(self, channel: Channel) -> None:
        lost = _request(3, kind=BACKWARD, name="grad_hidden")
        assert channel.submit(*lost).result(timeout=30).reply.header.failure.code == "unknown_step"
        header, payloads = _request(4)
        payloads[0].view(torch.float32)[7] = float("nan")
        failure = channel.submit(header, payloads).result(timeout=30).reply.header.failure
        assert failure.code == NonFiniteError.code
        assert failure.cure
        assert channel.submit(*_request(5)).result(timeout=30).reply.has("hidden")

    def test_what_breaks_the_protocol_ends_the_stream(self, channel: Channel) -> None:
        with pytest.raises(ProtocolError, match="not understood"):
            channel.submit(*_request(6, name="grad_hidden")).result(timeout=30)
        with pytest.raises(TightbeamError):
            channel.submit(*_request(7)).result(timeout=30)

    def test_a_step_over_the_limit_ends_the_stream_with_its_reason(self, channel: Channel) -> None:
        with pytest.raises(StepTooLargeError, match="limit of 4096"):
            channel.submit(*_request(8, 4097)).result(timeout=30)

    def test_after_close_nothing_is_sent(self, channel: Channel) -> None:
        channel.close()
        with pytest.raises(CloudUnavailableError, match="closed"):
            channel.submit(*_request(9)).result(timeout=30)


class TestInProcess(ChannelContract):
    @pytest.fixture
    def channel(
        self, tiny_cloud: Callable[[str], InProcessCloud], request: pytest.FixtureRequest
    ) -> Iterator[Channel]:
        channel = tiny_cloud("llama").open_channel(f"memory {request.node.name}", "1:2")
        yield channel
        channel.close()


class TestFaultless(ChannelContract):
    @pytest.fixture
    def channel(
        self, tiny_cloud: Callable[[str], InProcessCloud], request: pytest.FixtureRequest
    ) -> Iterator[Channel]:
        cloud = tiny_cloud("llama")
        inner = cloud.open_channel(f"faultless {request.node.name}", "1:2")
        channel = FaultyChannel(inner, deque(), cloud.forget_steps)
        yield channel
        channel.close()


class TestGrpc(ChannelContract):
    @pytest.fixture
    def channel(
        self, tiny_cloud: Callable[[str], InProcessCloud], request: pytest.FixtureRequest
    ) -> Iterator[Channel]:
        address, run = tiny_cloud("llama").address, f"grpc {request.node.name}"
        with connect(address, insecure=True, run=run) as cloud:
            channel = cloud._open_stream("1:2")
            yield channel
            channel.close()


_UP, _DOWN = bytes(range(32)), bytes(range(32, 64))


def _keys(sealing: Direction) -> tuple[Sealer, Opener]:
    secrets = {Direction.EDGE_TO_CLOUD: _UP, Direction.CLOUD_TO_EDGE: _DOWN}
    opening = Direction(3 - sealing)
    return Sealer(secrets[sealing], bytes(16), sealing), Opener(secrets[opening], bytes(16), opening)


@contextlib.contextmanager
def _lying_cloud(answer: Callable[[Sealer], list[bytes]]) -> Iterator[GrpcChannel]:
    """A real gRPC server that has the keys and answers the first record with whatever a test wants."""

    def steps(records: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(records)
        yield from answer(_keys(Direction.CLOUD_TO_EDGE)[0])

    service, _, method = STEPS_METHOD[1:].partition("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(steps)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    sealer, opener = _keys(Direction.EDGE_TO_CLOUD)
    session = Session(bytes(16), "cloud", "1:2", "f", "r", sealer, opener)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as connection:
        channel = GrpcChannel(connection, session, tls=False)
        try:
            yield channel
        finally:
            channel.close()
            server.stop(None).wait()


def _reply(sealer: Sealer, step: int, shape: tuple[int, ...]) -> list[bytes]:
    spec, payload = encode_tensor("hidden", torch.zeros(shape), "fp32")
    reply = StepReply(step=step, kind=FORWARD, tensors=[spec])
    return list(seal_message(reply.SerializeToString(), [payload], sealer))


def _ask(channel: GrpcChannel) -> Exchange:
    return channel.submit(*_request(1)).result(timeout=30)


def test_an_honest_answer_of_that_cloud_passes() -> None:
    with _lying_cloud(lambda sealer: _reply(sealer, 1, (5, 32))) as channel:
        assert _ask(channel).reply.tensor("hidden").shape == (5, 32)


def test_an_answer_that_nobody_asked() -> None:
    with (
        _lying_cloud(lambda sealer: _reply(sealer, 2, (5, 32))) as channel,
        pytest.raises(ProtocolError, match="answered step 2, which nobody asked"),
    ):
        _ask(channel)


@pytest.mark.parametrize("shape", [(4, 32), (5, 31), (1 << 12, 1 << 8), (5,)])
def test_an_answer_of_another_shape(shape: tuple[int, ...]) -> None:
    with (
        _lying_cloud(lambda sealer: _reply(sealer, 1, shape)) as channel,
        pytest.raises(ProtocolError, match="with tensors of shape"),
    ):
        _ask(channel)


def test_an_answer_without_a_tensor() -> None:
    empty = StepReply(step=1, kind=FORWARD).SerializeToString()
    with (
        _lying_cloud(lambda sealer: list(seal_message(empty, [], sealer))) as channel,
        pytest.raises(ProtocolError, match="shape"),
    ):
        _ask(channel)


def test_an_answer_sealed_by_somebody_else() -> None:
    with _lying_cloud(lambda sealer: [bytes(40)]) as channel, pytest.raises(IntegrityError):
        _ask(channel)


def test_a_stream_that_ends_fails_what_is_pending() -> None:
    with _lying_cloud(lambda sealer: []) as channel, pytest.raises(CloudUnavailableError):
        _ask(channel)


class _RpcError(grpc.RpcError):
    """What grpcio raises, whose own classes cannot be made by hand."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


@pytest.mark.parametrize(
    ("code", "details", "error", "transient"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect", CloudUnavailableError, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", CloudUnavailableError, True),
        (grpc.StatusCode.CANCELLED, "", CloudUnavailableError, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too much", CloudBusyError, True),
        (
            grpc.StatusCode.UNAVAILABLE,
            "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED",
            IdentityError,
            False,
        ),
        (grpc.StatusCode.DATA_LOSS, "", IntegrityError, False),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", ProtocolError, False),
    ],
)
def test_what_an_error_of_grpc_means(
    code: grpc.StatusCode, details: str, error: type[TightbeamError], transient: bool
) -> None:
    meant = error_from_rpc(_RpcError(code, details))
    assert type(meant) is error
    assert meant.transient == transient
    assert meant.cure


def test_an_error_of_ours_crosses_grpc_whole() -> None:
    sent = StepTooLargeError("A step of 9 | tokens\nis too large.", cure="Use fewer.")
    meant = error_from_rpc(_RpcError(grpc.StatusCode.INVALID_ARGUMENT, status_details(sent)))
    assert (type(meant), meant.message, meant.cure) == (
        StepTooLargeError,
        "A step of 9 | tokens is too large.",
        sent.cure,
    )


def test_a_peers_words_move_no_terminal() -> None:
    """Neither in an error of ours nor in one of gRPC."""
    for details in (status_details(UsageError("\x1b[2J\x07gone", cure="run\r\x1b]8;;x\x07")), "\x1b[31mred"):
        meant = error_from_rpc(_RpcError(grpc.StatusCode.UNAVAILABLE, details))
        assert str(meant).isprintable()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_an_answer_that_took_no_time_that_there_is(seconds: float) -> None:
    def answer(sealer: Sealer) -> list[bytes]:
        spec, payload = encode_tensor("hidden", torch.zeros(5, 32), "fp32")
        reply = StepReply(step=1, kind=FORWARD, tensors=[spec], compute_s=seconds)
        return list(seal_message(reply.SerializeToString(), [payload], sealer))

    with _lying_cloud(answer) as channel, pytest.raises(ProtocolError, match="seconds"):
        _ask(channel)
