"""Steps get through or fail clearly: what is retried, what is not, what is billed, what is never sent.

Over in-process channels with a script of faults; service, ledger and sealed records are the real ones.
"""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.in_process import Fault, InProcessCloud
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.backbone import Segments
from tightbeam.common.errors import (
    CloudBusyError,
    CloudUnavailableError,
    IntegrityError,
    NonFiniteError,
    StepConflictError,
    StepTooLargeError,
)
from tightbeam.edge.link.carrier import RetryPolicy
from tightbeam.edge.link.stepper import Inputs, Stepper

_SEGMENTS = Segments((4, 3), torch.tensor([0, 1, 2, 3, 0, 1, 2]))
_QUICK = RetryPolicy(first_wait_s=0.0, longest_wait_s=0.0)


@pytest.fixture(scope="module")
def cloud(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InProcessCloud]:
    with InProcessCloud(
        tiny_folder("llama"), tmp_path_factory.mktemp("cloud"), max_tokens_per_step=50
    ) as cloud:
        yield cloud


class Edge:
    """One run, its accounts and what it said."""

    def __init__(self, cloud: InProcessCloud, run: str, *faults: Fault, policy: RetryPolicy = _QUICK) -> None:
        self.cloud, self.run = cloud, run
        self.faults = deque(faults)
        self.rows: list[StepRow] = []
        self.said: list[str] = []
        self.stepper: Stepper = cloud.stepper(
            run, faults=self.faults, on_row=self.rows.append, on_retry=self.said.append, policy=policy
        )

    def forward(self, hidden_ND: Tensor | None = None, *, keep: bool = True) -> tuple[Tensor, Inputs]:
        return self.stepper.forward(_hidden() if hidden_ND is None else hidden_ND, _SEGMENTS, keep=keep)

    def backward(self, inputs: Inputs) -> Tensor:
        return self.stepper.backward(inputs, _hidden(1))

    def assert_billed_as_counted(self) -> None:
        (usage,) = self.cloud.ledger.usage("insecure/edge", [self.run])
        moved = sum((row.bytes for row in self.rows[1:]), self.rows[0].bytes)
        assert usage.bytes == moved
        assert usage.forward_steps + usage.backward_steps == len(self.rows)
        assert usage.tokens == sum(row.tokens for row in self.rows)


def _hidden(seed: int = 0) -> Tensor:
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(seed))


def test_a_step_without_faults(cloud: InProcessCloud) -> None:
    edge = Edge(cloud, "plain")
    _, step = edge.forward()
    edge.backward(step)
    assert [(row.kind, row.step, row.attempts, row.resent_bytes) for row in edge.rows] == [
        ("forward", 0, 1, 0),
        ("backward", 0, 1, 0),
    ]
    assert edge.said == []
    edge.assert_billed_as_counted()


@pytest.mark.parametrize("fault", [Fault.UNREACHABLE, Fault.BUSY, Fault.ALTERED])
def test_what_passes_is_tried_again(cloud: InProcessCloud, fault: Fault) -> None:
    edge = Edge(cloud, f"again {fault.name}", fault, fault, Fault.NONE, fault)
    _, step = edge.forward()
    edge.backward(step)
    # the backward's fresh session does not know the step: its third attempt brings the inputs along
    assert [row.attempts for row in edge.rows] == [3, 3]
    assert len(edge.said) == 3
    assert all("Retrying for up to" in line for line in edge.said)
    edge.assert_billed_as_counted()


def test_a_lost_reply_is_billed_once_and_shows_as_resent(cloud: InProcessCloud) -> None:
    edge = Edge(cloud, "lost reply", Fault.REPLY_LOST)
    expected_ND, _ = Edge(cloud, "lost reply twin").forward()
    out_ND, step = edge.forward()
    assert torch.equal(out_ND, expected_ND)
    (row,) = edge.rows
    assert row.attempts == 2
    # the second exchange is as long as the first, but for the receipt that tells of it
    assert 0 <= row.resent_bytes - row.bytes.wire_total_bytes <= 64
    edge.assert_billed_as_counted()
    (usage,) = cloud.ledger.usage("insecure/edge", [edge.run])
    assert usage.reexecuted_steps == 1
    edge.backward(step)
    edge.assert_billed_as_counted()


def test_a_lost_step_sends_its_inputs_again(cloud: InProcessCloud) -> None:
    edge, twin = Edge(cloud, "lost step", Fault.NONE, Fault.STEP_LOST), Edge(cloud, "lost step twin")
    expected_ND = twin.backward(twin.forward()[1])
    assert torch.equal(edge.backward(edge.forward()[1]), expected_ND)
    row, plain = edge.rows[1], twin.rows[1]
    assert (
        row.bytes.payload_up_bytes == plain.bytes.payload_up_bytes
    )  # the inputs were paid for by the forward
    assert row.cloud_flops == plain.cloud_flops
    inputs_bytes = edge.rows[0].bytes.payload_up_bytes
    # the attempt that was answered UNKNOWN_STEP, and the inputs
    assert row.resent_bytes > plain.bytes.wire_up_bytes + inputs_bytes
    assert plain.resent_bytes == 0
    edge.assert_billed_as_counted()


def test_retrying_ends(cloud: InProcessCloud) -> None:
    brief = RetryPolicy(give_up_after_s=0.2, first_wait_s=0.05)
    edge = Edge(cloud, "ends", *[Fault.UNREACHABLE] * 100, policy=brief)
    with pytest.raises(CloudUnavailableError):
        edge.forward()
    assert 1 <= len(edge.said) < 10
    assert edge.rows == []


def test_a_wire_that_keeps_altering_records_is_given_up(cloud: InProcessCloud) -> None:
    edge = Edge(cloud, "altered", *[Fault.ALTERED] * 100)
    with pytest.raises(IntegrityError):
        edge.forward()
    assert len(edge.said) == RetryPolicy().max_integrity_failures


def test_a_permanent_error_is_not_retried_after_an_altered_record(cloud: InProcessCloud) -> None:
    """A run whose name was used before meets another content under its first key."""
    Edge(cloud, "used").forward()
    edge = Edge(cloud, "used", Fault.ALTERED)
    with pytest.raises(StepConflictError, match="Start a new run"):
        edge.forward(_hidden(5))
    assert len(edge.said) == 1


def test_two_edges_with_one_run_do_not_mix(cloud: InProcessCloud) -> None:
    """The second is refused, and the first gets the gradient of what it sent itself."""
    first, second, alone = Edge(cloud, "shared"), Edge(cloud, "shared"), Edge(cloud, "alone")
    _, step = first.forward()
    with pytest.raises(StepConflictError):
        second.forward(_hidden(5))
    assert torch.equal(first.backward(step), alone.backward(alone.forward()[1]))
    first.assert_billed_as_counted()


def test_the_same_step_twice_is_one_step(cloud: InProcessCloud) -> None:
    """An edge that died after sending comes back with the same content: it gets the answer, and no bill."""
    first, again = Edge(cloud, "twice"), Edge(cloud, "twice")
    assert torch.equal(first.forward()[0], again.forward()[0])
    assert again.rows[0].bytes == first.rows[0].bytes
    (usage,) = cloud.ledger.usage("insecure/edge", ["twice"])
    assert (usage.forward_steps, usage.reexecuted_steps) == (1, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_sent(cloud: InProcessCloud, value: float) -> None:
    edge, bad_ND = Edge(cloud, f"finite {value}"), _hidden()
    bad_ND[2, 2] = value
    with pytest.raises(NonFiniteError, match="nothing was sent"):
        edge.forward(bad_ND)
    _, step = edge.forward()
    with pytest.raises(NonFiniteError, match="gradients"):
        edge.stepper.backward(step, bad_ND)
    assert len(edge.rows) == 1


def test_a_step_that_is_too_large_is_not_sent(cloud: InProcessCloud) -> None:
    edge = Edge(cloud, "large")
    with pytest.raises(StepTooLargeError, match=r"51 tokens is over the cloud's limit of 50.*batch_size"):
        edge.stepper.forward(torch.zeros(51, 32), Segments((51,), torch.arange(51)), keep=False)


def test_a_busy_cloud_that_stays_busy_says_so(cloud: InProcessCloud) -> None:
    edge = Edge(cloud, "busy", *[Fault.BUSY] * 100, policy=RetryPolicy(give_up_after_s=0.0))
    with pytest.raises(CloudBusyError):
        edge.forward()
    assert edge.said == []


@pytest.mark.parametrize(("codec", "bytes_per_value"), [("fp32", 4), ("bf16", 2)])
def test_a_codec_counts_in_both_directions(cloud: InProcessCloud, codec: str, bytes_per_value: int) -> None:
    rows: list[StepRow] = []
    stepper = cloud.stepper(f"codec {codec}", codec=codec, on_row=rows.append)
    stepper.forward(_hidden(), _SEGMENTS, keep=False)
    moved = rows[0].bytes
    assert moved.payload_up_bytes == moved.payload_down_bytes == 7 * 32 * bytes_per_value
