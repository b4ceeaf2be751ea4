"""Clients that stall or ask for too much: what they can take is bounded, and the others are served."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from support.abuser import Abuser, own_channel
from support.commands import Cloud
from support.split_runs import split_run
from tightbeam.cloud.admission import Quota, WaitingRoom
from tightbeam.common.errors import CloudBusyError, StepTooLargeError, TightbeamError
from tightbeam.common.identity.identities import Role, ephemeral_identity
from tightbeam.common.wire.handshake import ClientHandshake, CloudKeys, Session
from tightbeam.common.wire.messages import seal_message
from tightbeam.edge.link.channel import error_from_rpc
from tightbeam.proto import backbone_pb2 as pb

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MIB = 1 << 20


def impatient_cloud() -> None:
    """Runs in the cloud's process: it waits a second for the rest of a step, not a minute."""
    from tightbeam.cloud import stream

    stream.STALL_S, stream.MIN_BYTES_PER_S = 1.0, 4 * MIB


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    folder, limit = tmp_path_factory.mktemp("cloud"), str(4 * MIB)
    with Cloud(model, folder, "--in-flight-bytes", limit, before=impatient_cloud) as process:
        yield process


@pytest.fixture
def channel(cloud: Cloud) -> Iterator[grpc.Channel]:
    with own_channel(cloud.address) as channel:
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


def test_streams_that_announce_steps_and_send_nothing_take_nothing(
    cloud: Cloud, channel: grpc.Channel
) -> None:
    """Each announces all that one client may have; what does not come is not counted."""
    abuser, before_bytes = Abuser(channel, "hoarder"), rss_bytes(cloud)
    calls = []
    for _ in range(12):
        session = abuser.handshake()
        calls.append(abuser.stream(session, [abuser.header(session, 8_000)]))
    time.sleep(0.3)
    with split_run(cloud.address, name="hoarder") as honest:
        assert honest.gradients()
        assert honest.retries == []
    assert all("did not come within 1 s" in ends_with(call).message for call in calls)
    assert rss_bytes(cloud) - before_bytes < 32 * MIB


def test_many_streams_with_half_a_step_each(cloud: Cloud, channel: grpc.Channel) -> None:
    """Each step is larger than one client's share, so they are admitted one at a time, for a second."""
    abuser = Abuser(channel, "halves")
    errors = [ends_with(call) for call in [abuser.half_a_step(65_500) for _ in range(6)]]
    busy = [error for error in errors if isinstance(error, CloudBusyError)]
    assert len(busy) == 5
    assert "limit of 2,097,152 bytes of steps in flight for one client" in busy[0].message
    assert all("did not come" in error.message for error in errors if error not in busy)
    assert all(error.transient for error in errors)
    with split_run(cloud.address, name="halves") as honest:  # what they held was given back
        assert honest.gradients()


def test_a_step_larger_than_a_share_leaves_the_others_theirs(cloud: Cloud, channel: grpc.Channel) -> None:
    """It is admitted alone, trickles in, and is ended though no record of it is late."""
    abuser = Abuser(channel, "giant")
    call = abuser.half_a_step(65_500, pause_s=0.7)  # 4 MiB, 16 MiB with what is made of it
    with split_run(cloud.address, name="patient") as other:
        for seed in range(3):
            assert other.gradients(seed)
        assert other.retries == []
    started_s = time.monotonic()
    assert "did not come" in ends_with(call).message
    assert time.monotonic() - started_s < 5


def test_a_refusal_for_bytes_in_flight_is_retried(cloud: Cloud, channel: grpc.Channel) -> None:
    abuser = Abuser(channel, "shared")
    with split_run(cloud.address, name="shared") as run:
        call = abuser.half_a_step(65_500)  # more than all that one client may have
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
    with pytest.raises(CloudBusyError, match="for one client"):
        quota.take("huge")
    with pytest.raises(CloudBusyError, match="for all clients"):  # one such at a time
        quota.take("giant", 1000)
    quota.take("a", 4)  # its own share is not touched
    with pytest.raises(CloudBusyError, match="for all clients"):
        quota.take("b", 1)


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
