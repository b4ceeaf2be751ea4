"""The service: what it admits, what it answers when something breaks, and what it tells whom.

Over in-process channels: the real service, sealed records, no network.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from support.in_process import InProcessChannel, InProcessCloud
from tightbeam.common.errors import (
    CloudUnavailableError,
    CodecError,
    CutError,
    FingerprintError,
    IntegrityError,
    ProtocolError,
    StepTooLargeError,
    TightbeamError,
)
from tightbeam.common.identity.identities import ephemeral_identity
from tightbeam.common.wire.handshake import ClientHandshake
from tightbeam.common.wire.messages import encode_tensor
from tightbeam.common.wire.status import error_from_details
from tightbeam.proto import backbone_pb2 as pb


@pytest.fixture(scope="module")
def cloud(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InProcessCloud]:
    folder = tmp_path_factory.mktemp("cloud")
    with InProcessCloud(tiny_folder("llama"), folder, max_tokens_per_step=100) as cloud:
        yield cloud


@pytest.fixture
def channel(cloud: InProcessCloud, request: pytest.FixtureRequest) -> Iterator[InProcessChannel]:
    channel = cloud.open_channel(request.node.name, "1:2")
    yield channel
    channel.close()


def _request(num_tokens: int = 5, **changes: Any) -> tuple[pb.StepRequest, list[Tensor]]:
    spec, payload = encode_tensor("hidden", torch.ones(num_tokens, 32), "fp32")
    fields: dict[str, Any] = {
        "step": 0,
        "kind": pb.FORWARD,
        "reply_codec": "fp32",
        "lengths": [num_tokens],
        "run_starts": [0],
        "run_lengths": [num_tokens],
        "tensors": [spec],
    }
    return pb.StepRequest(**(fields | changes)), [payload]


def _spec(**changes: Any) -> pb.TensorSpec:
    fields: dict[str, Any] = {"name": "hidden", "codec": "fp32", "shape": [5, 32], "dtype": "float32"}
    return pb.TensorSpec(**(fields | changes))


def _shared(of: int, rows: int) -> dict[str, Any]:
    """Sequences of three and two tokens, of which the second shares."""
    lengths = {"lengths": [3, 2], "run_starts": [0, 0], "run_lengths": [3, 2]}
    return lengths | {
        "prefix_of": [0, of],
        "prefix_rows": [0, rows],
        "tensors": [_spec(shape=[5 - rows, 32])],
    }


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kind": 0}, ProtocolError, "kind 0"),
        ({"kind": 7}, ProtocolError, "kind 7"),
        ({"kind": pb.BACKWARD}, ProtocolError, r"\['hidden'\] is not understood"),
        ({"tensors": []}, ProtocolError, r"tensors \[\]"),
        ({"tensors": [_spec(name="other")]}, ProtocolError, "not understood"),
        ({"tensors": [_spec(shape=[5, 31])]}, ProtocolError, "must have the shape"),
        ({"tensors": [_spec(shape=[1, 5, 32])]}, ProtocolError, "must have the shape"),
        ({"tensors": [_spec(shape=[1 << 40, 32])]}, ProtocolError, "must have the shape"),
        ({"tensors": [_spec(codec="zip")]}, CodecError, "Unknown codec"),
        ({"reply_codec": "zip"}, CodecError, "Unknown codec"),
        ({"lengths": [4]}, ProtocolError, "must have the shape"),
        ({"lengths": [101]}, StepTooLargeError, "over this cloud's limit of 100"),
        ({"lengths": [1 << 31, 1 << 31]}, StepTooLargeError, "limit of 100"),
        ({"lengths": [5, 0]}, ProtocolError, "malformed"),
        ({"run_starts": []}, ProtocolError, "malformed"),
        ({"run_lengths": [0]}, ProtocolError, "malformed"),
        (_shared(0, 2) | {"tensors": [_spec()]}, ProtocolError, "must have the shape"),
        (_shared(1, 2), ProtocolError, "not before it"),
        (_shared(0, 3), ProtocolError, "more rows than there are"),
        (_shared(0, 2) | {"keep": True}, ProtocolError, "no backward will follow"),
        (_shared(0, 2) | {"prefix_of": []}, ProtocolError, "of each sequence"),
        ({"run_starts": [60]}, StepTooLargeError, "beyond the 64"),
        ({"run_starts": [1 << 31]}, StepTooLargeError, "beyond the 64"),
    ],
)
def test_a_request_that_is_refused_by_its_header(
    channel: InProcessChannel, changes: dict[str, Any], error: type[TightbeamError], words: str
) -> None:
    """Before any memory is taken; the stream ends, for its peer does not speak the protocol."""
    header, payloads = _request(**changes)
    with pytest.raises(error, match=words):
        channel.submit(header, payloads).result(timeout=30)


def test_shared_rows_that_are_none(channel: InProcessChannel) -> None:
    """At other positions: refused where the map is made, and the stream goes on."""
    payload = torch.ones(3, 32).flatten().view(torch.uint8)

    def ask(**changes: Any) -> pb.StepReply:
        header, _ = _request(**(_shared(0, 2) | changes))
        return channel.submit(header, [payload]).result(timeout=30).reply.header

    assert "other positions" in ask(run_starts=[0, 1]).failure.message
    assert [list(spec.shape) for spec in ask().tensors] == [[3, 32]]


def test_positions_that_do_not_cover_the_segments(channel: InProcessChannel) -> None:
    failure = channel.submit(*_request(run_lengths=[4])).result(timeout=30).reply.header.failure
    assert (failure.code, "do not cover" in failure.message) == ("protocol", True)


def test_a_record_that_does_not_open_ends_the_stream(cloud: InProcessCloud) -> None:
    channel = cloud.open_channel("garbage", "1:2")
    channel.send(bytes(64))
    channel.send(None)
    with pytest.raises((IntegrityError, CloudUnavailableError)):
        channel.submit(*_request()).result(timeout=30)
    channel.close()
    assert channel._failure is not None
    assert isinstance(channel._failure, IntegrityError)


def test_an_error_that_nobody_expected_is_an_answer(
    cloud: InProcessCloud,
    channel: InProcessChannel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The edge must not wait for ever, and the operator finds the trace."""

    def broken(*args: object) -> Tensor:
        raise RuntimeError("a kernel that does not exist")

    with monkeypatch.context() as patch:
        patch.setattr(cloud.backbone.trunk, "run", broken)
        failure = channel.submit(*_request()).result(timeout=30).reply.header.failure
    assert (failure.code, "kernel" in failure.message) == ("internal", False)
    assert "a kernel that does not exist" in caplog.text
    assert channel.submit(*_request(step=1)).result(timeout=30).reply.has("hidden")


def test_a_step_key_with_another_content(cloud: InProcessCloud, channel: InProcessChannel) -> None:
    first = channel.submit(*_request()).result(timeout=30).reply
    again = channel.submit(*_request()).result(timeout=30).reply
    assert torch.equal(first.tensor("hidden"), again.tensor("hidden"))
    assert not first.header.HasField("billed_before")
    assert again.header.billed_before.payload_up_bytes == 5 * 32 * 4
    header, payloads = _request()
    payloads[0][3] ^= 1
    conflict = channel.submit(header, payloads).result(timeout=30).reply.header.failure
    assert conflict.code == "step_conflict"
    run = "test_a_step_key_with_another_content"
    (usage,) = cloud.ledger.usage("insecure/edge", [run])
    assert (usage.forward_steps, usage.reexecuted_steps) == (1, 1)


def test_the_same_key_of_another_tenant_is_another_step(cloud: InProcessCloud) -> None:
    for tenant in ("anna", "bert"):
        channel = cloud.open_channel("ours", "1:2", tenant)
        assert not channel.submit(*_request()).result(timeout=30).reply.header.HasField("billed_before")
        channel.close()


def test_a_stream_that_ended_leaves_nothing(cloud: InProcessCloud) -> None:
    cloud.forget_steps()
    channel = cloud.open_channel("leaves", "1:2")
    channel.submit(*_request(keep=True)).result(timeout=30)
    assert len(cloud.retention) == 1
    channel.close()
    cloud.engine._worker.submit("insecure/edge", lambda: None).result(timeout=30)
    assert len(cloud.retention) == 0


class _Refusing:
    """A call's context; gives the refusal as the error that the edge would see."""

    async def abort(self, code: object, details: str) -> None:
        error = error_from_details(details)
        assert error is not None
        raise error


@pytest.mark.parametrize(
    ("cut", "words"), [("0:1", "bottom blocks, not 0"), ("3:3", "no trunk"), ("x", "not a cut")]
)
def test_a_handshake_for_a_cut_that_is_not_allowed(cloud: InProcessCloud, cut: str, words: str) -> None:
    card, identity, context = cloud.card, ephemeral_identity("edge"), cast(Any, _Refusing())
    shake = ClientHandshake(
        card.key_bundle, identity, identity.trust, cut=cut, fingerprint=card.fingerprint, run="r"
    )
    with pytest.raises(CutError, match=words):
        cloud.run(cloud.service.handshake(shake.request, context))


def test_an_edge_with_other_weights_does_not_get_in(cloud: InProcessCloud) -> None:
    card, identity = cloud.card, ephemeral_identity("edge")
    with pytest.raises(FingerprintError, match="not abababababab"):
        ClientHandshake(card.key_bundle, identity, identity.trust, cut="1:2", fingerprint="ab" * 32, run="r")


def test_a_cloud_that_shuts_down_takes_nothing_new(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with InProcessCloud(tiny_folder("llama"), tmp_path) as cloud:
        channel = cloud.open_channel("drain", "1:2")
        cloud.run(cloud.service.drain(1.0))
        failure = channel.submit(*_request()).result(timeout=30).reply.header.failure
        assert failure.code == "unavailable"  # transient: the edge looks for another
        with pytest.raises(CloudUnavailableError, match="shutting down"):
            cloud.open_channel("more", "1:2")
        channel.close()


def test_describe_answers_while_steps_run(cloud: InProcessCloud, channel: InProcessChannel) -> None:
    pending = [
        channel.submit(*_request(90, step=n, lengths=[45, 45], run_starts=[0, 0], run_lengths=[45, 45]))
        for n in range(8)
    ]

    async def ask() -> list[str]:
        describe: Any = cloud.service.describe
        cards = await asyncio.gather(*(describe(pb.DescribeRequest(), None) for _ in range(20)))
        return [card.fingerprint for card in cards]

    assert set(cloud.run(ask())) == {cloud.backbone.fingerprint}
    assert all(future.result(timeout=30).reply.has("hidden") for future in pending)
