"""Delta codecs over real steps: the values of a reference, the same after any loss, and bounded memory.

Over in-process channels; service, engine, ledger and sealed records are the real ones.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from torch import Tensor

from support.in_process import Fault, InProcessCloud
from support.tiny import tiny_model
from tightbeam.common.backbone import PackedTrunk, Segments
from tightbeam.common.config import Codecs
from tightbeam.common.costs.rows import StepRow
from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.codecs import codec
from tightbeam.common.wire.delta import OVERHEAD_BYTES, BaseStore, Samples, encode_delta
from tightbeam.edge.carrier import RetryPolicy
from tightbeam.edge.channel import Channel
from tightbeam.edge.deltas import EdgeDeltas
from tightbeam.edge.jobs import Job
from tightbeam.edge.stepper import Inputs, Stepper
from tightbeam.proto import backbone_pb2 as pb

LENGTHS, SIZE = (4, 3), 32
SEGMENTS = Segments(LENGTHS, torch.tensor([0, 1, 2, 3, 0, 1, 2]))
IDS = (torch.tensor([5, 6, 7, 8, 9, 10, 11]), torch.tensor([21, 22, 23, 24, 25, 26, 27]))
SPAN = range(1, 4)
BATCH_BYTES = 2 * 2 * (7 * SIZE * 2 + 2 * OVERHEAD_BYTES)  # two versions, both directions, two samples
_QUICK = RetryPolicy(first_wait_s=0.0, longest_wait_s=0.0)


@pytest.fixture(scope="module")
def cloud(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InProcessCloud]:
    with InProcessCloud(tiny_folder("llama"), tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture(autouse=True)
def _streams_end(cloud: InProcessCloud) -> Iterator[None]:
    yield
    cloud.hang_up()


class Edge:
    """One run that sees two batches of two samples in turn, each a little moved."""

    def __init__(
        self,
        cloud: InProcessCloud,
        *faults: Fault,
        codec: str | Codecs = "delta-int4/fp32",
        delta_bytes: float = float("inf"),
    ) -> None:
        self.cloud, self.run = cloud, str(uuid4())
        self.faults = deque(faults)
        self.rows: list[StepRow] = []
        self.stepper: Stepper = cloud.stepper(
            self.run, codec=codec, faults=self.faults, on_row=self.rows.append, policy=_QUICK,
            delta_bytes=delta_bytes,
        )  # fmt: skip

    def forward(self, epoch: int, batch: int = 0) -> tuple[Tensor, Inputs]:
        return self.stepper.forward(hidden(epoch, batch), SEGMENTS, keep=True, input_ids_N=IDS[batch])

    def both(self, epoch: int, batch: int = 0) -> tuple[Tensor, Tensor]:
        out_ND, inputs = self.forward(epoch, batch)
        return out_ND, self.stepper.backward(inputs, hidden(99))

    def train(self, between: Callable[[int], None] = lambda epoch: None) -> list[Tensor]:
        """Three epochs over both batches; everything that came back."""
        found: list[Tensor] = []
        for epoch in range(3):
            between(epoch)
            for batch in (0, 1):
                found += self.both(epoch, batch)
        return found

    def restart_cloud(self) -> None:
        """It loses the connection, and what it remembers."""
        self.stepper.close()
        self.cloud.deltas.clear()

    def assert_billed_as_counted(self) -> None:
        (usage,) = self.cloud.ledger.usage("insecure/edge", [self.run])
        assert usage.bytes == sum((row.bytes for row in self.rows[1:]), self.rows[0].bytes)
        assert usage.forward_steps + usage.backward_steps == len(self.rows)


def hidden(epoch: int, batch: int = 0) -> Tensor:
    """A batch's activations, which move by a twentieth every epoch."""
    draws = torch.Generator().manual_seed(batch)
    values = torch.randn(7, SIZE, generator=draws)
    for _ in range(epoch):
        values = values + 0.05 * torch.randn(7, SIZE, generator=draws)
    return values


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def reference(codec_name: str, epochs: int, batch: int = 0) -> list[Tensor]:
    """What comes back of one batch when the trunk runs here, between two cuts that are delta-coded here."""
    trunk, found = PackedTrunk(tiny_model("llama")), []
    up, down = BaseStore(), BaseStore()
    samples = Samples.of([b"one", b"two"], LENGTHS, SIZE)
    for epoch in range(epochs):
        _, decoded_ND = encode_delta(codec_name, hidden(epoch, batch), up.latest(samples), LENGTHS)
        up.remember(samples, decoded_ND)
        leaf_ND = decoded_ND.float().requires_grad_()
        out_ND = trunk.run(leaf_ND, SEGMENTS, SPAN)
        _, answer_ND = encode_delta(codec_name, out_ND, down.latest(samples), LENGTHS)
        down.remember(samples, answer_ND)
        (grad_ND,) = torch.autograd.grad(out_ND, leaf_ND, hidden(99))
        found += [answer_ND, grad_ND]
    return found


@pytest.mark.parametrize("name", ["int4", "int5", "int8"])
def test_steps_give_what_the_reference_gives(cloud: InProcessCloud, name: str) -> None:
    edge = Edge(cloud, codec=f"delta-{name}/fp32")
    found = [tensor for epoch in range(3) for tensor in edge.both(epoch)]
    assert same(found, reference(name, 3))
    assert [row.attempts for row in edge.rows] == [1] * 6
    edge.assert_billed_as_counted()


def test_it_comes_nearer_to_exact_than_the_codec_alone(cloud: InProcessCloud) -> None:
    exact, plain, delta = (Edge(cloud, codec=name) for name in ("fp32", "int4/fp32", "delta-int4/fp32"))
    errors = []
    for epoch in range(4):
        wanted = exact.both(epoch)
        errors.append(
            [[float((a - b).norm() / b.norm()) for a, b in zip(edge.both(epoch), wanted, strict=True)]
             for edge in (plain, delta)]
        )  # fmt: skip
    (plain_out, plain_grad), (delta_out, delta_grad) = errors[-1]
    assert delta_out < plain_out / 4
    assert delta_grad < plain_grad / 4
    assert errors[0][0] == pytest.approx(errors[0][1], rel=0.1)  # the first time there is nothing to go by


@pytest.mark.parametrize("fault", [Fault.UNREACHABLE, Fault.BUSY, Fault.ALTERED, Fault.REPLY_LOST])
def test_a_step_that_is_sent_again_changes_no_bit(cloud: InProcessCloud, fault: Fault) -> None:
    calm, shaken = Edge(cloud), Edge(cloud, *[fault, Fault.NONE] * 9)  # every step meets it once
    assert same(calm.train(), shaken.train())
    assert any(row.attempts > 1 for row in shaken.rows)
    shaken.assert_billed_as_counted()


def test_a_lost_step_is_recomputed_on_the_decoded_inputs(cloud: InProcessCloud) -> None:
    calm, shaken = Edge(cloud), Edge(cloud, *[Fault.NONE, Fault.STEP_LOST] * 3)
    assert same(
        [t for epoch in range(3) for t in calm.both(epoch)],
        [t for epoch in range(3) for t in shaken.both(epoch)],
    )
    brought = shaken.rows[1].bytes.payload_up_bytes - calm.rows[1].bytes.payload_up_bytes
    assert brought == 7 * SIZE * 2  # bfloat16


def test_holding_and_recomputing_give_the_same(
    cloud: InProcessCloud, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with InProcessCloud(tiny_folder("llama"), tmp_path, retention_bytes=7 * SIZE * 4) as short:
        assert same(Edge(cloud).train(), Edge(short).train())
        assert short.ledger.usage("insecure/edge", None)[0].reexecuted_steps == 0


def test_a_cloud_that_forgets_gets_whole_values_and_nothing_changes(cloud: InProcessCloud) -> None:
    calm, shaken = Edge(cloud), Edge(cloud)
    assert same(calm.train(), shaken.train(lambda epoch: shaken.restart_cloud()))
    forwards = [row for row in shaken.rows if row.kind == "forward"]
    assert [row.attempts for row in forwards] == [1, 1, 2, 2, 2, 2]
    # the values and the bases of the reply, each in bfloat16, for once
    whole = 2 * 7 * SIZE * 2 + 2 * (16 + 8 + 8)
    assert [row.bytes.payload_up_bytes for row in forwards[2:]] == [whole] * 4
    assert all(row.resent_bytes > 0 for row in forwards[2:])
    shaken.assert_billed_as_counted()


def test_a_reply_lost_by_a_cloud_that_then_restarts_is_billed_once(cloud: InProcessCloud) -> None:
    """The step comes again as other bytes under the same key, and is known for the same step."""
    calm, shaken = Edge(cloud), Edge(cloud)
    calm.forward(0)
    shaken.forward(0)
    shaken.faults.append(Fault.REPLY_LOST)
    shaken.stepper._carrier._on_retry = lambda line: cloud.deltas.clear()
    expected_ND, _ = calm.forward(1)
    assert torch.equal(shaken.forward(1)[0], expected_ND)
    assert shaken.rows[-1].attempts == 3
    (usage,) = cloud.ledger.usage("insecure/edge", [shaken.run])
    assert (usage.forward_steps, usage.reexecuted_steps) == (2, 1)
    shaken.assert_billed_as_counted()


def test_an_edge_that_lost_everything_starts_anew(cloud: InProcessCloud) -> None:
    edge = Edge(cloud)
    edge.both(0)
    assert edge.stepper.deltas is not None
    edge.stepper.deltas.clear()
    assert edge.stepper.deltas.num_bytes == 0
    found = edge.both(0)
    assert same(list(found), reference("int4", 1))
    assert edge.rows[-2].attempts == 1


@pytest.mark.parametrize("way", ["up", "down"])
def test_one_direction_alone(cloud: InProcessCloud, way: str) -> None:
    names = {"gradients": "fp32", "activations": "int4", f"activations_{way}": "delta-int4"}
    edge = Edge(cloud, codec=Codecs.model_validate(names))
    edge.both(0)
    cloud.deltas.clear()
    _, inputs = edge.forward(0)
    assert inputs.codec == ("bf16" if way == "up" else "int4")
    rows_bytes = {name: codec(name).num_bytes((7, SIZE)) for name in ("int4", "bf16")}
    first, again = (row.bytes.payload_up_bytes - 2 * (16 + 8) for row in edge.rows[::2])
    assert first == rows_bytes["int4"]
    assert again == rows_bytes["bf16"] + (0 if way == "up" else rows_bytes["int4"])
    edge.assert_billed_as_counted()


def test_what_no_backward_follows_is_coded_alone(cloud: InProcessCloud) -> None:
    edge, plain = Edge(cloud), Edge(cloud, codec="int4/fp32")
    edge.both(0)
    kept_bytes = cloud.deltas.num_bytes
    found, expected = (
        each.stepper.forward(hidden(0), SEGMENTS, keep=False, input_ids_N=IDS[0])[0] for each in (edge, plain)
    )
    assert torch.equal(found, expected)
    moved = [
        row.bytes.payload_up_bytes + row.bytes.payload_down_bytes for row in (edge.rows[-1], plain.rows[-1])
    ]
    assert moved[0] == moved[1] == 2 * codec("int4").num_bytes((7, SIZE))
    assert cloud.deltas.num_bytes == kept_bytes


def test_rows_whose_tokens_nobody_knows_are_coded_alone(cloud: InProcessCloud) -> None:
    edge, plain = Edge(cloud), Edge(cloud, codec="int4/fp32")
    for _ in range(2):
        found, expected = (each.stepper.forward(hidden(0), SEGMENTS, keep=True)[0] for each in (edge, plain))
        assert torch.equal(found, expected)


def test_the_keys_tell_nothing_to_who_can_guess_the_text() -> None:
    """Same tokens: the same key within a run, another one in every other run."""

    def keys(deltas: EdgeDeltas, *ids: Tensor) -> list[bytes]:
        return [deltas._samples(SEGMENTS, each, SIZE).keys[0] for each in ids]

    one, other = (EdgeDeltas(Codecs.model_validate("delta-int4/fp32"), 1e6) for _ in range(2))
    mine, again, next_one = keys(one, IDS[0], IDS[0], IDS[1])
    assert mine == again
    assert len({mine, next_one, *keys(other, IDS[0])}) == 3


def test_two_models_of_one_run_do_not_take_each_others_bases(cloud: InProcessCloud) -> None:
    first, second = Edge(cloud), Edge(cloud)
    second.stepper = cloud.stepper(
        first.run, codec="delta-int4/fp32", on_row=second.rows.append, numbers=itertools.count(100)
    )
    for _ in range(2):
        first.forward(0)
        second.forward(3)
    assert [row.attempts for row in first.rows + second.rows] == [1] * 4


def test_a_sample_is_known_again_wherever_padding_puts_it(cloud: InProcessCloud) -> None:
    edge = Edge(cloud)
    edge.forward(0)
    padded = Segments(LENGTHS, torch.tensor([0, 1, 2, 3, 1, 2, 3]))
    deltas = edge.stepper.deltas
    assert deltas is not None
    samples = [deltas._samples(each, IDS[0], SIZE) for each in (SEGMENTS, padded)]
    assert samples[0] == samples[1]


def test_the_cloud_keeps_to_its_bound(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A tenant has half of it: one of two batches. An edge that keeps to the card is asked for no more."""
    bound = 2 * BATCH_BYTES
    with InProcessCloud(tiny_folder("llama"), tmp_path, delta_bytes=bound) as small:
        assert small.card.limits.delta_bytes == BATCH_BYTES
        roomy = Edge(small, delta_bytes=BATCH_BYTES / 2)
        roomy.train(lambda epoch: _assert_within(small, bound))
        assert all(row.attempts == 1 for row in roomy.rows)


@pytest.mark.parametrize("forgets", [True, False])
def test_an_edge_forgets_with_a_cloud_that_is_short_of_memory(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    """Whole values in every step of every epoch would cost more than no delta at all."""
    num_batches, epochs, bound = 12, 4, 8 * BATCH_BYTES  # four batches for a tenant
    if not forgets:
        monkeypatch.setattr(EdgeDeltas, "lost", lambda self, samples, session: None)
    with InProcessCloud(tiny_folder("llama"), tmp_path, delta_bytes=bound) as small:
        edge, exact = Edge(small), Edge(small, codec="fp32")
        for epoch in range(epochs):
            for batch in range(num_batches):
                ids_N = IDS[0] + 20 * batch
                found, wanted = (
                    each.stepper.forward(hidden(epoch, batch), SEGMENTS, keep=True, input_ids_N=ids_N)[0]
                    for each in (edge, exact)
                )
                assert float((found - wanted).norm() / wanted.norm()) < 0.2
                _assert_within(small, bound)
    again = [sum(row.attempts > 1 for row in edge.rows[n * 12 : n * 12 + 12]) for n in range(epochs)]
    assert again == ([0, 2, 2, 2] if forgets else [0, 12, 12, 12])


def _assert_within(cloud: InProcessCloud, bound: int) -> None:
    assert cloud.deltas.num_bytes <= bound // 2


def test_what_a_run_left_goes_when_its_stream_has_ended_for_long(
    cloud: InProcessCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge = Edge(cloud)
    edge.forward(0)
    assert cloud.deltas.num_bytes > 0
    monkeypatch.setattr(cloud.deltas, "idle_s", -0.9)  # for long: a tenth of a second
    edge.stepper.close()
    until_s = time.monotonic() + 20
    while cloud.deltas.num_bytes and time.monotonic() < until_s:
        time.sleep(0.02)
    assert cloud.deltas.num_bytes == 0


def test_a_cloud_without_memory_for_it_refuses(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with (
        InProcessCloud(tiny_folder("llama"), tmp_path, delta_bytes=0) as none,
        pytest.raises(ProtocolError, match="no memory for delta"),
    ):
        Edge(none).forward(0)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sample_keys", b"k" * 15, "do not fit"),
        ("sample_keys", b"k" * 32, "names a sample twice"),
        ("sample_keys", bytes(32), "sample that it does not name"),
        ("bases_up", b"b" * 8, "do not fit"),
        ("bases_down", b"b" * 1024, "do not fit"),
        ("keep", False, "Only a forward"),
    ],
)
def test_a_hostile_header_ends_the_stream(
    cloud: InProcessCloud, field: str, value: object, words: str
) -> None:
    edge = Edge(cloud)
    edge.forward(0)
    header, payloads = _request(edge)
    setattr(header, field, value)
    channel = cloud.open_channel(edge.run, "1:2")
    with pytest.raises(ProtocolError, match=words):
        channel.submit(header, payloads).result(timeout=30)


@pytest.mark.parametrize(("field", "code"), [("bases_up", "unknown_base"), ("bases_down", "unknown_base")])
def test_bases_that_nobody_sent_are_unknown(cloud: InProcessCloud, field: str, code: str) -> None:
    edge = Edge(cloud)
    edge.forward(0)
    header, payloads = _request(edge)
    setattr(header, field, b"guessed!" * 2)
    with _channel(cloud, edge.run) as channel:
        reply = channel.submit(header, payloads).result(timeout=30).reply.header
    assert reply.failure.code == code


def test_another_run_and_another_tenant_find_nothing(cloud: InProcessCloud) -> None:
    edge = Edge(cloud)
    edge.forward(0)
    header, payloads = _request(edge)
    for run, tenant in ((edge.run, "neighbour"), (str(uuid4()), "edge")):
        with _channel(cloud, run, tenant) as channel:
            reply = channel.submit(header, payloads).result(timeout=30).reply.header
        assert reply.failure.code == "unknown_base"
    with _channel(cloud, edge.run) as channel:  # and its own, in a new session, does
        assert not channel.submit(header, payloads).result(timeout=30).reply.header.failure.code


def test_bases_that_are_not_what_they_say_are_refused(cloud: InProcessCloud) -> None:
    edge = Edge(cloud)
    edge.forward(0)
    header, payloads = _request(edge)
    cloud.deltas.clear()
    header.bases_up = bytes(16)
    header.tensors.add(name="base", codec="bf16", shape=[7, SIZE], dtype="bfloat16")
    with _channel(cloud, edge.run) as channel:
        work = channel.submit(header, [*payloads, torch.zeros(7 * SIZE * 2, dtype=torch.uint8)])
        assert "not the ones that it names" in work.result(timeout=30).reply.header.failure.message


def _request(edge: Edge) -> tuple[pb.StepRequest, list[Tensor]]:
    """The delta of the edge's next step, not sent."""
    job = Job(pb.FORWARD, 1, SEGMENTS, reply_codec="int4", seed=0, keep=True)
    assert edge.stepper.deltas is not None
    edge.stepper.deltas.begin(job, hidden(1), IDS[0])
    return job.header, job.payloads


@contextmanager
def _channel(cloud: InProcessCloud, run: str, tenant: str = "edge") -> Iterator[Channel]:
    channel = cloud.open_channel(run, "1:2", tenant)
    try:
        yield channel
    finally:
        channel.close()
