"""What the cloud remembers of samples: whose goes first, and when all of it goes."""

import torch

from tightbeam.cloud.deltas import CloudDeltas, RunKey
from tightbeam.common.wire.delta import OVERHEAD_BYTES, Bases, BaseStore, Samples, encode_delta
from tightbeam.common.wire.delta_header import DeltaHeader
from tightbeam.common.wire.messages import Message, tensor_spec
from tightbeam.common.wire.stepping import HIDDEN
from tightbeam.proto.backbone_pb2 import FORWARD, StepRequest

SIZE, TOKENS = 16, 4
ONE_BYTES = TOKENS * SIZE * 2 + OVERHEAD_BYTES  # of one version of one sample in one direction


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Edge:
    """A run that sends one sample a step, up only or both ways."""

    def __init__(self, tenant: str, run: str = "run") -> None:
        self.key: RunKey = (tenant, run)
        self.store = BaseStore()

    def message(self, sample: int, down: Bases | None = None) -> Message[StepRequest]:
        samples = Samples.of([bytes([sample]) * 16], [TOKENS], SIZE)
        header = StepRequest(kind=FORWARD, keep=True, lengths=[TOKENS])
        hidden_ND = torch.randn(TOKENS, SIZE, generator=torch.Generator().manual_seed(sample))
        up = self.store.latest(samples)
        payload, decoded_ND = encode_delta("int8", hidden_ND, up, [TOKENS])
        self.store.remember(samples, decoded_ND)
        DeltaHeader.write(header, samples, up, down)
        header.tensors.append(tensor_spec(HIDDEN, hidden_ND, "int8"))
        return Message(header, [payload])

    def send(self, deltas: CloudDeltas, *sent: int) -> None:
        for sample in sent:
            deltas.receive(self.key, self.message(sample))

    def is_known(self, deltas: CloudDeltas, sample: int) -> bool:
        """Whether a delta to a sample's last value would be understood now."""
        samples = Samples.of([bytes([sample]) * 16], [TOKENS], SIZE)
        run = deltas._runs.get(self.key)
        return run is not None and run.up.latest(samples) != (None,)


def test_a_tenant_pushes_out_its_own_samples_and_its_quiet_runs_first() -> None:
    deltas = CloudDeltas(8 * ONE_BYTES, SIZE)
    quiet, busy, other = Edge("a", "quiet"), Edge("a", "busy"), Edge("b")
    other.send(deltas, 1)
    quiet.send(deltas, 1, 2)
    busy.send(deltas, 1, 2, 3)
    assert deltas.num_bytes == (1 + 4) * ONE_BYTES  # half of the bound is one tenant's
    assert other.is_known(deltas, 1)
    assert [busy.is_known(deltas, sample) for sample in (1, 2, 3)] == [True] * 3
    assert [quiet.is_known(deltas, sample) for sample in (1, 2)] == [False, True]


def test_all_tenants_together_keep_to_the_bound() -> None:
    deltas = CloudDeltas(6 * ONE_BYTES, SIZE)
    edges = [Edge(name) for name in "abcd"]
    for edge in edges:
        edge.send(deltas, 1, 2)
        assert deltas.num_bytes <= 6 * ONE_BYTES
    assert not edges[0].is_known(deltas, 1)
    assert edges[3].is_known(deltas, 1)
    assert edges[0].key not in deltas._runs  # nothing is left of it


def test_a_quiet_run_is_forgotten() -> None:
    clock = Clock()
    deltas = CloudDeltas(1 << 20, SIZE, idle_s=60.0, clock=clock)
    quiet, busy = Edge("a"), Edge("b")
    quiet.send(deltas, 1)
    clock.now_s = 50.0
    busy.send(deltas, 1)
    clock.now_s = 70.0
    deltas.expire()
    assert deltas.num_bytes == ONE_BYTES
    assert busy.is_known(deltas, 1)
    assert not quiet.is_known(deltas, 1)


def test_both_directions_count_and_go_together() -> None:
    deltas = CloudDeltas(1 << 20, SIZE)
    edge = Edge("a")
    forward = deltas.receive(edge.key, edge.message(1, down=(None,)))
    assert forward is not None
    deltas.answer(edge.key, forward, torch.ones(TOKENS, SIZE), "int8")
    assert deltas.num_bytes == 2 * ONE_BYTES
    deltas.clear()
    assert deltas.num_bytes == 0
