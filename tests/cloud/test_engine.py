"""The engine: forwards and backwards of the trunk equal autograd on the same blocks, whatever it kept."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from support.tiny import tiny_model
from tightbeam.cloud.engine import Engine
from tightbeam.cloud.retention import Retention, StepKey
from tightbeam.common.backbone import PackedTrunk, Segments
from tightbeam.common.errors import CloudBusyError, NonFiniteError, ProtocolError, UnknownStepError

T = TypeVar("T")
_SPAN = range(1, 4)
_KEY = StepKey("tenant", "session", "run", 0)
_SEGMENTS = Segments((4, 3), torch.tensor([0, 1, 2, 3, 0, 1, 2]))
_ROOM, _NO_ROOM = 1 << 24, 0


@pytest.fixture(scope="module")
def trunk() -> PackedTrunk:
    return PackedTrunk(tiny_model("llama"))


@pytest.fixture
def retention() -> Retention:
    return Retention(_ROOM, lambda segments, span: 1000)


@pytest.fixture
def engine(trunk: PackedTrunk, retention: Retention) -> Iterator[Engine]:
    engine = Engine(trunk, retention, torch.float32)
    yield engine
    engine.close()


def _hidden(seed: int = 0) -> Tensor:
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(seed))


def _await(work: Callable[[], Awaitable[T]]) -> T:
    async def run() -> T:
        return await work()

    return asyncio.run(run())


def _expected(trunk: PackedTrunk) -> tuple[Tensor, Tensor]:
    leaf_ND = _hidden().requires_grad_()
    out_ND = trunk.run(leaf_ND, _SEGMENTS, _SPAN)
    (grad_ND,) = torch.autograd.grad(out_ND, leaf_ND, _hidden(1))
    return out_ND.detach(), grad_ND


def test_forward_and_backward_are_those_of_autograd(trunk: PackedTrunk, engine: Engine) -> None:
    forward = _await(lambda: engine.forward(_KEY, _hidden(), _SEGMENTS, _SPAN, keep=True))
    backward = _await(lambda: engine.backward(_KEY, _hidden(1), None, _SEGMENTS, _SPAN))
    out_ND, grad_ND = _expected(trunk)
    assert torch.equal(forward.tensor_ND, out_ND)
    assert torch.equal(backward.tensor_ND, grad_ND)
    assert forward.retention == backward.retention == "hold"
    assert not forward.tensor_ND.requires_grad


def test_inputs_sent_again_give_the_same_bits(trunk: PackedTrunk, engine: Engine) -> None:
    backward = _await(lambda: engine.backward(_KEY, _hidden(1), _hidden(), _SEGMENTS, _SPAN))
    assert torch.equal(backward.tensor_ND, _expected(trunk)[1])
    assert backward.retention == "recompute"


def test_a_recompute_costs_the_tenant_nothing_more(engine: Engine) -> None:
    _await(lambda: engine.forward(_KEY, _hidden(), _SEGMENTS, _SPAN, keep=True))
    held = _await(lambda: engine.backward(_KEY, _hidden(1), None, _SEGMENTS, _SPAN))
    again = _await(lambda: engine.backward(_KEY, _hidden(1), _hidden(), _SEGMENTS, _SPAN))
    assert again.flops == held.flops > 0


def test_without_keep_nothing_is_kept(engine: Engine, retention: Retention) -> None:
    _await(lambda: engine.forward(_KEY, _hidden(), _SEGMENTS, _SPAN, keep=False))
    assert len(retention) == 0
    with pytest.raises(UnknownStepError, match="Send its inputs"):
        _await(lambda: engine.backward(_KEY, _hidden(1), None, _SEGMENTS, _SPAN))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(engine: Engine, retention: Retention, value: float) -> None:
    bad_ND = _hidden()
    bad_ND[3, 5] = value
    with pytest.raises(NonFiniteError, match="activations"):
        _await(lambda: engine.forward(_KEY, bad_ND, _SEGMENTS, _SPAN, keep=True))
    with pytest.raises(NonFiniteError, match="gradients"):
        _await(lambda: engine.backward(_KEY, bad_ND, _hidden(), _SEGMENTS, _SPAN))
    with pytest.raises(NonFiniteError, match="activations"):
        _await(lambda: engine.backward(_KEY, _hidden(1), bad_ND, _SEGMENTS, _SPAN))
    assert len(retention) == 0


@pytest.mark.parametrize(
    ("segments", "span"),
    [(_SEGMENTS, range(2, 4)), (Segments((3, 4), torch.tensor([0, 1, 2, 0, 1, 2, 3])), _SPAN)],
)
def test_a_backward_of_something_else_is_refused(engine: Engine, segments: Segments, span: range) -> None:
    _await(lambda: engine.forward(_KEY, _hidden(), _SEGMENTS, _SPAN, keep=True))
    with pytest.raises(ProtocolError, match="other segments or another cut"):
        _await(lambda: engine.backward(_KEY, _hidden(1), None, segments, span))


def test_steps_of_a_session_that_ended_are_freed(engine: Engine, retention: Retention) -> None:
    _await(lambda: engine.forward(_KEY, _hidden(), _SEGMENTS, _SPAN, keep=True))
    _await(lambda: engine.forward(_KEY._replace(session="other"), _hidden(), _SEGMENTS, _SPAN, keep=True))
    engine.forget_session("tenant", "session")
    _await(lambda: engine.backward(_KEY._replace(session="other"), _hidden(1), None, _SEGMENTS, _SPAN))
    assert len(retention) == 0


def test_a_device_without_memory_is_busy_and_frees_what_it_held(
    trunk: PackedTrunk, engine: Engine, retention: Retention
) -> None:
    class Full(PackedTrunk):
        """Stands for a device whose memory is used up, which a CPU cannot be brought to safely."""

        device = trunk.device

        def __init__(self) -> None:
            pass

        def run(self, hidden_ND: Tensor, segments: Segments, span: range) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    _await(lambda: engine.forward(_KEY, _hidden(), _SEGMENTS, _SPAN, keep=True))
    full = Engine(Full(), retention, torch.float32)
    with pytest.raises(CloudBusyError, match="out of memory"):
        _await(lambda: full.forward(StepKey("t", "s", "r", 1), _hidden(), _SEGMENTS, _SPAN, keep=True))
    full.close()
    assert len(retention) == 0


def test_many_at_once_run_one_after_the_other(trunk: PackedTrunk, engine: Engine) -> None:
    async def run() -> list[Tensor]:
        keys = [_KEY._replace(step=n) for n in range(6)]
        await asyncio.gather(*(engine.forward(k, _hidden(), _SEGMENTS, _SPAN, keep=True) for k in keys))
        done = await asyncio.gather(*(engine.backward(k, _hidden(1), None, _SEGMENTS, _SPAN) for k in keys))
        assert max(each.queue_s for each in done) >= min(each.compute_s for each in done)
        return [each.tensor_ND for each in done]

    for grad_ND in asyncio.run(run()):
        assert torch.equal(grad_ND, _expected(trunk)[1])


def test_tenants_take_turns(engine: Engine) -> None:
    """Forty steps of one wait before one of another; it is second, behind the one that runs."""

    async def run() -> list[str]:
        order: list[str] = []

        async def step(tenant: str, number: int) -> None:
            key = StepKey(tenant, "session", "run", number)
            await engine.forward(key, _hidden(), _SEGMENTS, _SPAN, keep=False)
            order.append(tenant)

        all_wait = threading.Event()
        engine._worker.submit("another", all_wait.wait)
        steps = [asyncio.create_task(step("greedy", n)) for n in range(40)]
        await asyncio.sleep(0)
        steps.append(asyncio.create_task(step("modest", 0)))
        await asyncio.sleep(0)
        all_wait.set()
        await asyncio.gather(*steps)
        return order

    assert asyncio.run(run()).index("modest") <= 3
