"""Encoded sums are exact in the ring, within the stated bound in the reals, and cannot overflow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from support.lora_states import random_state
from tightbeam.common.errors import FederationError, UpdateRefusedError
from tightbeam.federation.secagg.fixed_point import FixedPoint, Layout, WeightedSum
from tightbeam.federation.secagg.masks import ring_dtype


def summed(encoding: FixedPoint, clients: list[NDArray[np.float64]], weights: list[int]) -> WeightedSum:
    total = np.zeros(clients[0].size + 1, ring_dtype(encoding.ring_bits))
    for values, weight in zip(clients, weights, strict=True):
        total += encoding.encode(values, weight, "ward")
    return encoding.decode(total)


@pytest.mark.parametrize("ring_bits", [32, 64])
@given(data=st.data(), count=st.integers(1, 6), clip=st.sampled_from([0.5, 1.0, 3.7, 100.0]))
def test_the_mean_is_within_the_bound(data: st.DataObject, count: int, clip: float, ring_bits: int) -> None:
    encoding = FixedPoint.fitting(clip, 500, count, ring_bits)
    values = st.lists(st.floats(-clip, clip), min_size=3, max_size=3)
    clients = [np.array(data.draw(values)) for _ in range(count)]
    weights = data.draw(st.lists(st.integers(1, 500), min_size=count, max_size=count))
    result = summed(encoding, clients, weights)
    assert result.weight == sum(weights)
    exact = np.average(clients, axis=0, weights=weights)
    assert np.abs(result.mean - exact).max() <= encoding.error_bound + 1e-15 * clip


def test_the_bound_is_not_loose() -> None:
    """Half a step is reached: a bound that no value comes near would say little."""
    encoding = FixedPoint(1.0, 4, 1, 1, 32)
    value = np.array([0.5 / 16])
    assert abs(summed(encoding, [value], [1]).mean[0] - value[0]) == pytest.approx(encoding.error_bound)


@pytest.mark.parametrize("ring_bits", [32, 64])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_possible_sum_does_not_overflow(sign: float, ring_bits: int) -> None:
    encoding = FixedPoint.fitting(8.0, 1000, 100, ring_bits)
    result = summed(encoding, [np.full(4, sign * 8.0)] * 100, [1000] * 100)
    np.testing.assert_allclose(result.mean, sign * 8.0, rtol=1e-12)


def test_one_bit_more_would_overflow_and_is_refused() -> None:
    encoding = FixedPoint.fitting(8.0, 1000, 100, 32)
    with pytest.raises(FederationError, match="can overflow its ring"):
        FixedPoint(8.0, encoding.fraction_bits + 1, 1000, 100, 32)
    with pytest.raises(FederationError, match="64 bits"):
        FixedPoint.fitting(8.0, 10**6, 1000, 32)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_a_clip_range_that_is_none_is_refused(clip: float) -> None:
    with pytest.raises(FederationError):
        FixedPoint(clip, 8, 1, 1, 32)


@pytest.mark.parametrize("bad", [8.0001, -9.0, np.nan, np.inf])
def test_a_value_outside_is_refused_and_counted(bad: float) -> None:
    encoding = FixedPoint.fitting(8.0, 10, 10)
    with pytest.raises(UpdateRefusedError, match="1 of 3 values of ward-7"):
        encoding.encode(np.array([0.0, bad, 1.0]), 1, "ward-7")


@pytest.mark.parametrize("weight", [0, 11, -1])
def test_a_weight_outside_is_refused(weight: int) -> None:
    with pytest.raises(UpdateRefusedError, match=f"weight {weight} of ward-7"):
        FixedPoint.fitting(8.0, 10, 10).encode(np.zeros(3), weight, "ward-7")


def test_thirty_two_bits_cost_four_bytes_a_value() -> None:
    assert FixedPoint.fitting(8.0, 10, 10, 32).encode(np.zeros(99), 1, "ward").nbytes == 400


@pytest.mark.parametrize(
    ("max_weight", "ring_bits", "fraction_bits", "bound"), [(100, 32, 21, 2.4e-7), (10**6, 64, 39, 9.1e-13)]
)
def test_the_examples_of_the_docs(max_weight: int, ring_bits: int, fraction_bits: int, bound: float) -> None:
    encoding = FixedPoint.fitting(1.0, max_weight, 10, ring_bits)
    assert encoding.fraction_bits == fraction_bits
    assert encoding.error_bound == pytest.approx(bound, rel=0.01)


def test_a_layout_lays_out_and_cuts_back() -> None:
    state = random_state(4)
    layout = Layout.of(state)
    vector = layout.flatten(state, "ward")
    assert vector.shape == (layout.size,)
    cut = layout.unflatten(vector)
    assert cut.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(cut[name], tensor)
    assert Layout.of(dict(reversed(state.items()))) == layout


def test_another_rank_does_not_fit_the_layout() -> None:
    layout = Layout.of(random_state(4))
    with pytest.raises(UpdateRefusedError, match=r"ward-7 is refused: .*lora_A.weight .* another shape"):
        layout.flatten(random_state(8), "ward-7")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_named_before_anybody_masks_it(wrong: float) -> None:
    state = random_state(4)
    layout, name = Layout.of(state), sorted(state)[1]
    state[name].flat[3] = wrong
    with pytest.raises(UpdateRefusedError, match=f"ward-7 is refused: {name} holds NaN or infinite values"):
        layout.flatten(state, "ward-7")
