"""What the cloud keeps between forward and backward: the budget holds, and the oldest goes first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightbeam.cloud.retention import Retention
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


def _put(retention: Retention, step: int, *, graph: bool, session: str = "s") -> Tensor:
    hidden_ND = torch.full((10, 4), float(step)).requires_grad_(graph)
    out_ND = hidden_ND * 2 if graph else None
    retention.put((session, "run", step), hidden_ND, out_ND, _segments(), _SPAN)
    return hidden_ND


def test_a_step_is_taken_once() -> None:
    retention = _retention(10_000)
    hidden_ND = _put(retention, 1, graph=True)
    kept = retention.take(("s", "run", 1))
    assert kept is not None
    assert kept.hidden_ND is hidden_ND
    assert kept.out_ND is not None
    assert (len(retention), retention.used_bytes) == (0, 0)
    assert retention.take(("s", "run", 1)) is None


@pytest.mark.parametrize("key", [("other", "run", 1), ("s", "other", 1), ("s", "run", 2)])
def test_another_key_finds_nothing(key: tuple[str, str, int]) -> None:
    retention = _retention(10_000)
    _put(retention, 1, graph=True)
    assert retention.take(key) is None
    assert len(retention) == 1


def test_graphs_shrink_to_inputs_before_steps_go() -> None:
    retention = _retention(2 * _GRAPH_BYTES)
    for step in (1, 2):
        assert retention.can_hold(_segments(), _SPAN)
        _put(retention, step, graph=True)
    assert not retention.can_hold(_segments(), _SPAN)
    _put(retention, 3, graph=False)
    oldest, second = retention.take(("s", "run", 1)), retention.take(("s", "run", 2))
    assert oldest is not None
    assert oldest.out_ND is None
    assert not oldest.hidden_ND.requires_grad  # free of its graph
    assert second is not None
    assert second.out_ND is not None


def test_the_oldest_step_goes_when_nothing_can_shrink() -> None:
    retention = _retention(3 * _INPUT_BYTES)
    for step in range(5):
        _put(retention, step, graph=False)
    assert [retention.take(("s", "run", step)) is not None for step in range(5)] == [
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
    kept = retention.take(("s", "run", 1))
    assert kept is not None
    assert kept.hidden_ND is again_ND


def test_a_session_that_ended_leaves_nothing() -> None:
    retention = _retention(10_000)
    _put(retention, 1, graph=True)
    _put(retention, 2, graph=False)
    _put(retention, 1, graph=False, session="other")
    retention.discard_session("s")
    assert len(retention) == 1
    assert retention.used_bytes == _INPUT_BYTES
    retention.clear()
    assert (len(retention), retention.used_bytes) == (0, 0)


def test_an_abandoned_step_expires() -> None:
    clock = Clock()
    retention = _retention(_GRAPH_BYTES, clock)
    _put(retention, 1, graph=True)
    clock.now_s = 599.0
    assert not retention.can_hold(_segments(), _SPAN)
    clock.now_s = 601.0
    assert retention.can_hold(_segments(), _SPAN)
    assert len(retention) == 0


@settings(deadline=None)
@given(
    budget_bytes=st.integers(0, 5000),
    work=st.lists(st.tuples(st.sampled_from(["put", "graph", "take"]), st.integers(0, 6)), max_size=40),
)
def test_the_budget_is_never_exceeded(budget_bytes: int, work: list[tuple[str, int]]) -> None:
    retention = _retention(budget_bytes)
    for action, step in work:
        if action == "take":
            retention.take(("s", "run", step))
        else:
            _put(retention, step, graph=action == "graph" and retention.can_hold(_segments(), _SPAN))
        assert 0 <= retention.used_bytes <= budget_bytes
    for step in range(7):
        retention.take(("s", "run", step))
    assert (len(retention), retention.used_bytes) == (0, 0)
