"""A billed step may be computed again for a lost answer: the same step, not another one, and not for ever."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from support.in_process import InProcessChannel, InProcessCloud
from tightbeam.cloud.admission import Quota
from tightbeam.cloud.ledger import RunUsage
from tightbeam.common.errors import CloudBusyError, StepConflictError, StepRefusedError, error_from_code
from tightbeam.common.wire.messages import Message, encode_tensor
from tightbeam.common.wire.stepping import tensor_sha256
from tightbeam.edge.link.channel import Exchange
from tightbeam.proto import backbone_pb2 as pb

TOKENS = 6


@pytest.fixture(scope="module")
def cloud(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InProcessCloud]:
    with InProcessCloud(tiny_folder("llama"), tmp_path_factory.mktemp("cloud")) as started:
        yield started


@pytest.fixture
def client(cloud: InProcessCloud, request: pytest.FixtureRequest) -> Iterator["Client"]:
    """A client whose run has the test's name."""
    client = Client(cloud, request.node.name)
    yield client
    client.channel.close()


class Client:
    """Sends steps as the edge's own code would not."""

    def __init__(self, cloud: InProcessCloud, run: str) -> None:
        self._cloud, self.run, self.channel = cloud, run, cloud.open_channel(run, "1:1")

    def send(
        self, kind: pb.StepKind.ValueType, *seeds: int, step: int = 0, codec: str = "fp32"
    ) -> torch.Tensor:
        """A step with random tensors of those seeds; of a backward the gradient and, with two, the inputs."""
        return answer(
            self.submit(self.channel, kind, *seeds, step=step, codec=codec).result(timeout=30).reply
        )

    def submit(
        self,
        channel: InProcessChannel,
        kind: pb.StepKind.ValueType,
        *seeds: int,
        step: int = 0,
        codec: str = "fp32",
    ) -> "Future[Exchange]":
        header = pb.StepRequest(
            step=step, kind=kind, keep=kind == pb.FORWARD, reply_codec="fp32", lengths=[TOKENS],
            run_starts=[0], run_lengths=[TOKENS],
        )  # fmt: skip
        names = ["hidden"] if kind == pb.FORWARD else ["grad_hidden", "hidden"]
        payloads = []
        for name, seed in zip(names, seeds, strict=False):
            noise = torch.randn(
                TOKENS, self._cloud.backbone.trunk.hidden_size, generator=torch.Generator().manual_seed(seed)
            )
            spec, payload = encode_tensor(name, noise, codec)
            header.tensors.append(spec)
            payloads.append(payload)
        return channel.submit(header, payloads)

    def usage(self) -> RunUsage:
        (usage,) = self._cloud.ledger.usage("insecure/edge", [self.run])
        return usage


def answer(reply: Message[pb.StepReply]) -> torch.Tensor:
    if reply.header.HasField("failure"):
        failure = reply.header.failure
        raise error_from_code(failure.code, failure.message, failure.cure)
    return reply.tensor(reply.header.tensors[0].name)


def test_one_key_buys_one_backward_whatever_inputs_come_along(client: Client) -> None:
    client.send(pb.FORWARD, 0)
    bought = client.send(pb.BACKWARD, 1)
    for seed in range(2, 22):
        with pytest.raises(StepConflictError, match="another content"):
            client.send(pb.BACKWARD, 1, seed)
    # negative control: the same inputs are the same step, held or brought along
    assert torch.equal(client.send(pb.BACKWARD, 1, 0), bought)
    usage = client.usage()
    assert (usage.backward_steps, usage.reexecuted_steps) == (1, 1)


def test_a_held_forward_is_part_of_its_backward(cloud: InProcessCloud, client: Client) -> None:
    client.send(pb.BACKWARD, 1, 5)  # the forward is not billed: it pays for the inputs
    paid = client.usage().bytes.payload_up_bytes
    client.send(pb.FORWARD, 6)
    with pytest.raises(StepConflictError):
        client.send(pb.BACKWARD, 1)
    assert paid == 2 * TOKENS * cloud.backbone.trunk.hidden_size * 4


def test_inputs_that_the_cloud_lost_are_not_paid_for_twice(cloud: InProcessCloud, client: Client) -> None:
    client.send(pb.FORWARD, 0)
    cloud.forget_steps()
    client.send(pb.BACKWARD, 1, 0)
    one = TOKENS * cloud.backbone.trunk.hidden_size * 4
    assert client.usage().bytes.payload_up_bytes == 2 * one


def test_how_a_tensor_is_coded_is_part_of_it() -> None:
    payload = torch.zeros(8, dtype=torch.uint8)
    plain: dict[str, Any] = {"name": "hidden", "codec": "int8", "shape": [2, 4], "dtype": "float32"}
    others: list[dict[str, Any]] = [
        {},
        {"codec": "int8s"},
        {"dtype": "bfloat16"},
        {"shape": [4, 2]},
        {"name": "grad_hidden"},
    ]
    digests = {tensor_sha256(pb.TensorSpec(**(plain | other)), payload) for other in others}
    assert len(digests) == 5
    assert tensor_sha256(pb.TensorSpec(**plain), payload.clone()) in digests


def test_the_same_step_is_computed_again_thirty_two_times(client: Client) -> None:
    first = client.send(pb.FORWARD, 0)
    for _ in range(32):
        assert torch.equal(client.send(pb.FORWARD, 0), first)
    with pytest.raises(StepRefusedError, match="was computed again 32 times"):
        client.send(pb.FORWARD, 0)
    assert client.usage().reexecuted_steps == 32
    for step in range(1, 40):  # negative control: as many new ones
        client.send(pb.FORWARD, 0, step=step)


def test_a_tenant_repeats_no_more_than_its_share(
    cloud: InProcessCloud, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud.service._runner._repeats, "_quota", Quota("steps computed again", 1 << 62, 5))
    for step in range(6):
        client.send(pb.FORWARD, 0, step=step)
    for step in range(5):
        client.send(pb.FORWARD, 0, step=step)
    with pytest.raises(CloudBusyError, match="5 steps computed again for one client"):
        client.send(pb.FORWARD, 0, step=5)
    client.send(pb.FORWARD, 0, step=6)  # who goes on may repeat again
    client.send(pb.FORWARD, 0, step=5)


def test_two_at_a_time_are_not_two_for_one(cloud: InProcessCloud, client: Client) -> None:
    channels = [cloud.open_channel(client.run, "1:1") for _ in range(8)]
    futures = [client.submit(channel, pb.FORWARD, 0) for channel in channels]
    codes = [future.result(timeout=30).reply.header.failure.code for future in futures]
    assert codes.count("") >= 1
    assert set(codes) <= {"", "busy"}
    usage = client.usage()
    assert (usage.forward_steps, usage.reexecuted_steps) == (1, codes.count("") - 1)
    for channel in channels:
        channel.close()


def test_a_tenant_has_two_steps_under_way(
    cloud: InProcessCloud, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, under_way, most = cloud.service._runner, Counter[str](), Counter[str]()
    compute = runner._compute

    async def counted(message: Any, session: Any, *rest: Any) -> Any:
        under_way[session.peer] += 1
        most[session.peer] = max(most[session.peer], under_way[session.peer])
        await asyncio.sleep(0.02)
        under_way[session.peer] -= 1
        return await compute(message, session, *rest)

    monkeypatch.setattr(runner, "_compute", counted)
    futures = [client.submit(client.channel, pb.FORWARD, 0, step=step) for step in range(8)]
    other = cloud.open_channel("other", "1:1", tenant="other")
    futures.append(client.submit(other, pb.FORWARD, 0))
    assert all(answer(future.result(timeout=30).reply).numel() for future in futures)
    assert most == {"insecure/edge": 2, "insecure/other": 1}
    other.close()
