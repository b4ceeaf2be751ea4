"""One tenant takes what it can get of the cloud: memory, descriptors, the device. The others are served."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers import LlamaConfig, LlamaForCausalLM

from support.abuser import Abuser, own_channel
from support.commands import Cloud
from support.edge_runs import byte_tokenizer
from support.split_runs import split_run
from tightbeam.common.errors import CloudBusyError
from tightbeam.edge.link.channel import error_from_rpc
from tightbeam.proto import backbone_pb2 as pb

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MIB = 1 << 20


def impatient_cloud() -> None:
    """Runs in the cloud's process: who reads nothing is ended after two seconds, not after a minute."""
    from tightbeam.cloud import rpc, stream

    stream.STALL_S = rpc._LAST_WORDS_S = 1.0


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Its embedding is a blob of 32 MiB; its blocks are small."""
    folder = tmp_path_factory.mktemp("model")
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=1 << 18,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    options = ("--retention-bytes", str(16 * MIB))
    with Cloud(folder, tmp_path_factory.mktemp("cloud"), *options, before=impatient_cloud) as process:
        yield process


def process(cloud: Cloud) -> psutil.Process:
    return psutil.Process(cloud.command.process.pid)


def eventually(done: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    until_s = time.monotonic() + timeout_s
    while not done() and time.monotonic() < until_s:
        time.sleep(0.1)
    return done()


def health(cloud: Cloud) -> int:
    with own_channel(cloud.address) as channel:
        request = health_pb2.HealthCheckRequest(service="tightbeam.v1.Backbone")
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)


def test_downloads_that_nobody_reads(cloud: Cloud) -> None:
    before_bytes, descriptors = process(cloud).memory_info().rss, process(cloud).num_fds()
    with own_channel(cloud.address) as channel:
        abuser = Abuser(channel, "unread")
        blob = max(abuser.card.blobs, key=lambda blob: blob.num_bytes)
        request = pb.DownloadRequest(sha256=blob.sha256)
        calls = [abuser.stub.Download(request, metadata=abuser.metadata) for _ in range(100)]
        ended = [call for call in calls if eventually(lambda call=call: not call.is_active(), 0.05)]  # type: ignore[misc]
        busy = [call for call in ended if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert len(busy) == 92
        assert process(cloud).num_fds() - descriptors < 24
        assert process(cloud).memory_info().rss - before_bytes < 96 * MIB
        assert health(cloud) == health_pb2.HealthCheckResponse.SERVING
        with split_run(cloud.address, name="patient") as other:  # which downloads its weights
            assert other.gradients()
            assert other.retries == []
        # what is not read is ended, and its share given back
        assert eventually(lambda: not any(call.is_active() for call in calls))
        assert (
            sum(len(chunk.data) for chunk in abuser.stub.Download(request, metadata=abuser.metadata))
            == blob.num_bytes
        )
    assert eventually(lambda: process(cloud).num_fds() - descriptors < 8)
    assert "Traceback" not in cloud.log


def test_downloads_that_are_read_pass_the_same_limit(cloud: Cloud) -> None:
    """Negative control: the same number, one after the other."""
    with own_channel(cloud.address) as channel:
        client = Abuser(channel, "reader")
        small = min(client.card.blobs, key=lambda blob: blob.num_bytes)
        for _ in range(100):
            chunks = client.stub.Download(pb.DownloadRequest(sha256=small.sha256), metadata=client.metadata)
            assert sum(len(chunk.data) for chunk in chunks) == small.num_bytes


def test_edges_that_never_read_are_ended_and_their_memory_freed(cloud: Cloud) -> None:
    def deaf(abuser: Abuser, run: str) -> Any:
        session = abuser.handshake(run)
        records = (
            abuser.records(session, abuser.forward(8_000, step)) for step in range(12)
        )  # 12 MB of answers
        return abuser.stream(session, itertools.chain.from_iterable(records))

    rss_bytes = []
    for attempt in range(2):
        with own_channel(cloud.address) as channel:
            abuser = Abuser(channel, "deaf")
            calls = [deaf(abuser, f"run-{attempt}-{number}") for number in range(16)]
            with split_run(cloud.address, name="patient") as other:
                assert other.gradients()
                assert other.retries == []
            assert eventually(lambda: not any(call.is_active() for call in calls), 60.0)  # noqa: B023
            rss_bytes.append(process(cloud).memory_info().rss)
    assert "took nothing for 1 s" in cloud.log
    assert "Traceback" not in cloud.log
    assert rss_bytes[1] - rss_bytes[0] < 72 * MIB  # the allocator keeps some; one round alone takes 100
    with own_channel(cloud.address) as channel:  # and their streams
        again = Abuser(channel, "deaf")
        streams = [again.stream(again.handshake(), []) for _ in range(16)]
        time.sleep(0.5)
        assert all(call.is_active() for call in streams)


def test_who_takes_no_answers_has_few_steps_computed(cloud: Cloud) -> None:
    with own_channel(cloud.address) as channel:
        abuser = Abuser(channel, "wasteful")
        session = abuser.handshake()
        records = (abuser.records(session, abuser.forward(8_000, step)) for step in range(12))
        call = abuser.stream(session, itertools.chain.from_iterable(records))
        assert eventually(lambda: not call.is_active(), 60.0)
        (used,) = abuser.stub.Usage(pb.UsageRequest(), metadata=abuser.metadata).runs
    assert 1 <= used.forward_steps <= 9  # four answers fit what gRPC lets be on the way


def test_eighty_forwards_evict_nobody_else(cloud: Cloud) -> None:
    with own_channel(cloud.address) as channel, split_run(cloud.address, name="victim") as victim:
        abuser = Abuser(channel, "greedy")
        session = abuser.handshake()

        def flood() -> None:
            records = [
                record
                for step in range(80)
                for record in abuser.records(session, abuser.forward(8_000, step, keep=True))
            ]
            call = abuser.stream(session, records)
            for _ in range(80 * 2):
                next(call)  # header and payload of each answer

        victim.gradients(between=flood)
        assert [(row.kind, row.attempts) for row in victim.rows] == [("forward", 1), ("backward", 1)]
        victim.assert_accounts_agree()


def test_too_many_questions_at_once_are_refused(cloud: Cloud) -> None:
    with own_channel(cloud.address) as channel:
        abuser = Abuser(channel, "curious")
        futures = [abuser.stub.Usage.future(pb.UsageRequest(), metadata=abuser.metadata) for _ in range(300)]
        failed: list[Any] = [error for future in futures if (error := future.exception()) is not None]
        assert all(isinstance(error_from_rpc(error), CloudBusyError) for error in failed)
        assert len(failed) < 300
        assert list(abuser.stub.Usage(pb.UsageRequest(), metadata=abuser.metadata).runs) == []
