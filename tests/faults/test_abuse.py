"""Clients that stall or ask for too much: what they can take is bounded, and the others are served."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from support.commands import Cloud
from support.split_runs import split_run
from tightbeam.cloud.admission import Quota, WaitingRoom
from tightbeam.common.errors import CloudBusyError, StepTooLargeError, TightbeamError
from tightbeam.common.identity import Role, ephemeral_identity
from tightbeam.common.wire.handshake import ClientHandshake, CloudKeys, Session
from tightbeam.common.wire.messages import seal_message
from tightbeam.common.wire.stepping import SESSION_KEY
from tightbeam.edge.channel import STEPS_METHOD, error_from_rpc
from tightbeam.proto import backbone_pb2 as pb
from tightbeam.proto.backbone_pb2_grpc import BackboneStub

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MIB = 1 << 20


def impatient_cloud() -> None:
    """Runs in the cloud's process: it waits a second for the rest of a step, not a minute."""
    from tightbeam.cloud import stream

    stream.STALL_S = 1.0


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    folder, limit = tmp_path_factory.mktemp("cloud"), str(8 * MIB)
    with Cloud(model, folder, "--in-flight-bytes", limit, before=impatient_cloud) as process:
        yield process


class Abuser:
    """Speaks the protocol well and behaves badly."""

    def __init__(self, channel: grpc.Channel, name: str = "abuser") -> None:
        self._channel, self._stub, self._name = channel, BackboneStub(channel), name

    def handshake(self) -> Session:
        card = self._stub.Describe(pb.DescribeRequest(), timeout=10)
        identity = ephemeral_identity(self._name)
        shake = ClientHandshake(
            card.key_bundle, identity, identity.trust, cut="1:1", fingerprint=card.fingerprint, run="r"
        )
        try:
            return shake.finish(self._stub.Handshake(shake.request, timeout=10))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def stream(self, session: Session, records: list[bytes]) -> Any:
        def requests() -> Iterator[bytes]:
            yield from records
            time.sleep(3600)  # says no more, and does not hang up

        method: Any = self._channel.stream_stream(STEPS_METHOD)
        call: Any = method(requests(), metadata=((SESSION_KEY, session.session_id.hex()),))
        return call

    def header(self, session: Session, num_tokens: int) -> bytes:
        """The sealed header of a forward, without its tensor."""
        spec = pb.TensorSpec(name="hidden", codec="fp32", shape=[num_tokens, 16], dtype="float32")
        lengths = [200] * (num_tokens // 200) + [num_tokens % 200] * bool(num_tokens % 200)
        request = pb.StepRequest(
            kind=pb.FORWARD, reply_codec="fp32", lengths=lengths,
            run_starts=[0] * len(lengths), run_lengths=lengths, tensors=[spec],
        )  # fmt: skip
        return next(seal_message(request.SerializeToString(), [], session.sealer))


@pytest.fixture
def channel(cloud: Cloud) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(cloud.address) as channel:
        yield channel


def rss_bytes(cloud: Cloud) -> int:
    return int(psutil.Process(cloud.command.process.pid).memory_info().rss)


def ends_with(call: Any) -> TightbeamError:
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    return error_from_rpc(caught.value)


def test_fifty_sessions_that_never_open_a_stream(cloud: Cloud, channel: grpc.Channel) -> None:
    before_bytes = rss_bytes(cloud)
    abuser, refused = Abuser(channel, "idle-sessions"), []
    for _ in range(50):
        try:
            abuser.handshake()
        except CloudBusyError as error:
            refused.append(error)
    assert len(refused) == 50 - 16
    assert refused[0].transient
    assert refused[0].cure
    assert rss_bytes(cloud) - before_bytes < 16 * MIB
    with split_run(cloud.address, name="patient") as other:
        assert other.gradients()
        assert other.retries == []


def test_fifty_streams_that_send_nothing(cloud: Cloud, channel: grpc.Channel) -> None:
    before_bytes = rss_bytes(cloud)
    abuser = Abuser(channel, "idle-streams")
    calls = [abuser.stream(abuser.handshake(), []) for _ in range(50)]
    for call in calls[32:]:
        assert isinstance(ends_with(call), CloudBusyError)
    assert all(call.is_active() for call in calls[:32])
    assert rss_bytes(cloud) - before_bytes < 32 * MIB
    with split_run(cloud.address, name="patient") as other:
        assert other.gradients()
        assert other.retries == []
    for call in calls:
        call.cancel()


def test_a_header_that_announces_ten_gigabytes(cloud: Cloud, channel: grpc.Channel) -> None:
    before_bytes, abuser = rss_bytes(cloud), Abuser(channel, "greedy")
    session = abuser.handshake()
    big = pb.StepRequest(kind=pb.FORWARD, reply_codec="fp32", lengths=[160_000_000])
    big.tensors.add(name="hidden", codec="fp32", shape=[160_000_000, 16], dtype="float32")
    record = next(seal_message(big.SerializeToString(), [], session.sealer))
    error = ends_with(abuser.stream(session, [record]))
    assert isinstance(error, StepTooLargeError)
    assert "160000000 tokens is over this cloud's limit of 65536" in error.message
    assert not error.transient
    assert rss_bytes(cloud) - before_bytes < 16 * MIB


def test_many_streams_with_half_a_step_each(cloud: Cloud, channel: grpc.Channel) -> None:
    """Each step is within the limit, together they are over the tenant's share; they hold it for a second."""
    abuser, started_s = Abuser(channel, "hoarder"), time.monotonic()
    calls = []
    for _ in range(6):
        session = abuser.handshake()
        calls.append(abuser.stream(session, [abuser.header(session, 6_000)]))  # 2 x 2 x 375 KiB
    errors = [ends_with(call) for call in calls]
    busy = [error for error in errors if isinstance(error, CloudBusyError)]
    stalled = [error for error in errors if "did not come within 1 s" in error.message]
    assert len(busy) == 4
    assert "limit of 4,194,304 bytes of steps in flight for one client" in busy[0].message
    assert len(stalled) == 2
    assert all(error.transient for error in errors)
    assert time.monotonic() - started_s < 10
    with split_run(cloud.address, name="hoarder") as honest:  # what they held was given back
        assert honest.gradients()


def test_a_refusal_for_bytes_in_flight_is_retried(cloud: Cloud, channel: grpc.Channel) -> None:
    abuser = Abuser(channel, "shared")
    with split_run(cloud.address, name="shared") as run:
        session = abuser.handshake()
        call = abuser.stream(session, [abuser.header(session, 16_380)])  # 4 MB: all that one client may have
        time.sleep(0.3)
        assert run.gradients()
        assert "bytes of steps in flight for one client. Retrying for up to" in run.retries[0]
        run.assert_accounts_agree()
    assert "did not come" in ends_with(call).message


def test_a_quota_counts_tenants_apart_and_together() -> None:
    quota = Quota("things", total=10, per_tenant=6)
    quota.take("a", 6)
    with pytest.raises(CloudBusyError, match="6 things for one client"):
        quota.take("a")
    with pytest.raises(CloudBusyError, match="10 things for all clients"):
        quota.take("b", 5)
    quota.take("b", 4)
    quota.give("a", 6)
    quota.take("c", 6)
    assert quota.used == 10
    for tenant, amount in (("b", 4), ("c", 6)):
        quota.give(tenant, amount)
    quota.take("huge", 1000)  # alone: the card's limit decides, not this one
    with pytest.raises(CloudBusyError):
        quota.take("a", 1)


def test_sessions_wait_for_a_minute_and_are_taken_once() -> None:
    now, cloud, edge = [0.0], ephemeral_identity("cloud", Role.CLOUD), ephemeral_identity("me")
    room = WaitingRoom(Quota("sessions", 2, 2), clock=lambda: now[0])

    def session() -> Session:
        keys = CloudKeys.generate(cloud, "f")
        shake = ClientHandshake(keys.bundle, edge, edge.trust, cut="1:1", fingerprint="f", run="r")
        return keys.accept(shake.request, cloud.trust)[1]

    first, second = session(), session()
    room.put(first, range(1, 5))
    room.put(second, range(1, 5))
    with pytest.raises(CloudBusyError):
        room.put(session(), range(1, 5))
    taken = room.take(first.session_id.hex())
    assert taken is not None
    assert (taken.session, taken.span) == (first, range(1, 5))
    assert room.take(first.session_id.hex()) is None
    assert room.take("no hex at all") is None
    now[0] = 61.0
    assert room.take(second.session_id.hex()) is None
    room.put(second, range(1, 5))
    now[0] = 130.0
    room.put(first, range(1, 5))  # the expired one makes room
    room.put(session(), range(1, 5))
