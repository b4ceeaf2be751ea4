"""What the cloud keeps between forward and backward: the budget holds, and the oldest goes first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightbeam.cloud.retention import Kept, Retention, StepKey
from tightbeam.common.backbone import Segments

_SPAN = range(1, 4)
_INPUT_BYTES = 10 * 4 * 4  # ten tokens of width 4 in float32
_GRAPH_BYTES = 1000


def _segments() -> Segments:
    return Segments((10,), torch.arange(10))


def _retention(budget_bytes: int, clock: "Clock | None" = None) -> Retention:
    return Retention(budget_bytes, lambda segments, span: _GRAPH_BYTES, clock=clock or Clock())


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _key(step: int, *, session: str = "s", run: str = "run", tenant: str = "t") -> StepKey:
    return StepKey(tenant, session, run, step)


def _put(retention: Retention, step: int, *, graph: bool, session: str = "s", tenant: str = "t") -> Tensor:
    hidden_ND = torch.full((10, 4), float(step)).requires_grad_(graph)
    out_ND = hidden_ND * 2 if graph else None
    kept = Kept(hidden_ND, out_ND, _segments(), _SPAN, b"sha")
    retention.put(_key(step, session=session, tenant=tenant), kept)
    return hidden_ND


def test_a_step_is_taken_once() -> None:
    retention = _retention(10_000)
    hidden_ND = _put(retention, 1, graph=True)
    kept = retention.take(_key(1))
    assert kept is not None
    assert kept.hidden_ND is hidden_ND
    assert kept.out_ND is not None
    assert (len(retention), retention.used_bytes) == (0, 0)
    assert retention.take(_key(1)) is None


@pytest.mark.parametrize(
    "key", [_key(1, session="other"), _key(1, run="other"), _key(1, tenant="other"), _key(2)]
)
def test_another_key_finds_nothing(key: StepKey) -> None:
    retention = _retention(10_000)
    _put(retention, 1, graph=True)
    assert retention.take(key) is None
    assert len(retention) == 1


def test_graphs_shrink_to_inputs_before_steps_go() -> None:
    retention = _retention(2 * _GRAPH_BYTES)
    for step in (1, 2):
        assert retention.can_hold("t", _segments(), _SPAN)
        _put(retention, step, graph=True)
    assert not retention.can_hold("t", _segments(), _SPAN)
    _put(retention, 3, graph=False)
    oldest, second = retention.take(_key(1)), retention.take(_key(2))
    assert oldest is not None
    assert oldest.out_ND is None
    assert not oldest.hidden_ND.requires_grad  # free of its graph
    assert second is not None
    assert second.out_ND is not None


def test_the_oldest_step_goes_when_nothing_can_shrink() -> None:
    retention = _retention(3 * _INPUT_BYTES)
    for step in range(5):
        _put(retention, step, graph=False)
    assert [retention.take(_key(step)) is not None for step in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("budget_bytes", [0, _INPUT_BYTES - 1])
def test_what_does_not_fit_alone_is_not_kept(budget_bytes: int) -> None:
    retention = _retention(budget_bytes)
    _put(retention, 1, graph=False)
    assert (len(retention), retention.used_bytes) == (0, 0)


def test_a_step_put_again_replaces_the_first() -> None:
    retention = _retention(10_000)
    _put(retention, 1, graph=True)
    again_ND = _put(retention, 1, graph=True)
    assert retention.used_bytes == _GRAPH_BYTES
    kept = retention.take(_key(1))
    assert kept is not None
    assert kept.hidden_ND is again_ND


def test_a_session_that_ended_leaves_nothing() -> None:
    retention = _retention(10_000)
    _put(retention, 1, graph=True)
    _put(retention, 2, graph=False)
    _put(retention, 1, graph=False, session="other")
    retention.discard_session("t", "s")
    assert len(retention) == 1
    assert retention.used_bytes == _INPUT_BYTES
    retention.clear()
    assert (len(retention), retention.used_bytes) == (0, 0)


def test_an_abandoned_step_expires() -> None:
    clock = Clock()
    retention = _retention(_GRAPH_BYTES, clock)
    _put(retention, 1, graph=True)
    clock.now_s = 599.0
    assert not retention.can_hold("t", _segments(), _SPAN)
    clock.now_s = 601.0
    assert retention.can_hold("t", _segments(), _SPAN)
    assert len(retention) == 0


def _hold(retention: Retention, step: int, tenant: str) -> bool:
    graph = retention.can_hold(tenant, _segments(), _SPAN)
    _put(retention, step, graph=graph, tenant=tenant)
    return graph


def test_eighty_forwards_of_one_tenant_cost_another_nothing() -> None:
    retention = _retention(4 * _GRAPH_BYTES)
    assert _hold(retention, 0, "victim")
    for step in range(80):
        _hold(retention, step, "greedy")
    kept = retention.take(_key(0, tenant="victim"))
    assert kept is not None
    assert kept.out_ND is not None
    assert retention.used_bytes <= retention.budget_bytes


def test_who_comes_late_gets_an_equal_share() -> None:
    retention = _retention(4 * _GRAPH_BYTES)
    for step in range(80):
        _hold(retention, step, "greedy")
    assert [_hold(retention, step, "late") for step in range(3)] == [True, True, False]
    assert retention.used_bytes <= retention.budget_bytes


def test_a_tenant_over_its_share_gives_its_own_oldest() -> None:
    retention = _retention(10 * _INPUT_BYTES)
    for step in range(4):
        _put(retention, step, graph=False, tenant="small")
    for step in range(20):
        _put(retention, step, graph=False, tenant="big")
    assert all(retention.take(_key(step, tenant="small")) for step in range(4))
    assert [step for step in range(20) if retention.take(_key(step, tenant="big"))] == [*range(14, 20)]


def test_one_tenant_keeps_a_thousand_steps_at_most() -> None:
    retention = _retention(1 << 30)
    for step in range(1100):
        _put(retention, step, graph=False)
    assert len(retention) == 1024
    assert retention.take(_key(75)) is None
    assert retention.take(_key(76)) is not None


@settings(deadline=None)
@given(
    budget_bytes=st.integers(0, 5000),
    work=st.lists(
        st.tuples(
            st.sampled_from(["put", "graph", "take"]), st.integers(0, 6), st.sampled_from(["t", "u", "v"])
        ),
        max_size=40,
    ),
)
def test_the_budget_is_never_exceeded(budget_bytes: int, work: list[tuple[str, int, str]]) -> None:
    retention = _retention(budget_bytes)
    for action, step, tenant in work:
        if action == "take":
            retention.take(_key(step, tenant=tenant))
        else:
            graph = action == "graph" and retention.can_hold(tenant, _segments(), _SPAN)
            _put(retention, step, graph=graph, tenant=tenant)
        assert 0 <= retention.used_bytes <= budget_bytes
    for step in range(7):
        for tenant in ("t", "u", "v"):
            retention.take(_key(step, tenant=tenant))
    assert (len(retention), retention.used_bytes) == (0, 0)
