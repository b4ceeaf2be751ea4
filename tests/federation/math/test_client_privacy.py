"""What a client does before it hands anything out: its change is bounded, and its noise is what it says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightbeam.federation.math.privacy import clipped, gaussian, length, noised

SEED = bytes(range(32))


def _arrays(scale: float, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"a": scale * rng.normal(size=(3, 5)), "b": scale * rng.normal(size=7)}


def _distance_from_normal(draws: np.ndarray) -> float:
    """Kolmogorov's: the most by which the shares below a value differ from those of N(0, 1)."""
    ordered = np.sort(draws)
    below = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in ordered])
    return float(np.abs(below - (np.arange(ordered.size) + 0.5) / ordered.size).max())


def test_length_is_that_of_all_tensors_end_to_end() -> None:
    arrays = _arrays(1.0)
    assert length(arrays) == pytest.approx(
        np.linalg.norm(np.concatenate([a.ravel() for a in arrays.values()]))
    )
    assert length({}) == 0.0


@given(scale=st.floats(1e-3, 1e3), norm=st.floats(1e-3, 1e3))
def test_a_change_is_never_longer_than_the_norm_and_keeps_its_direction(scale: float, norm: float) -> None:
    before = _arrays(1.0, 1) | {"more": np.ones(2)}
    change = _arrays(scale, 2)
    result = clipped({name: before[name] + step for name, step in change.items()}, before, norm)
    assert result.keys() == change.keys()
    got = {name: array - before[name] for name, array in result.items()}
    assert length(got) <= norm * (1 + 1e-9) + 1e-12
    expected = min(1.0, norm / length(change))
    for name, step in got.items():
        np.testing.assert_allclose(step, expected * change[name], rtol=1e-6, atol=1e-9)


def test_a_short_change_and_none_at_all_stay_as_they_are() -> None:
    before, change = _arrays(1.0), _arrays(1e-3, 3)
    after = {name: before[name] + change[name] for name in before}
    for given_, norm in ((after, 10.0), (before, 1e-9)):
        result = clipped(given_, before, norm)
        assert all(np.allclose(result[name], given_[name], rtol=0, atol=1e-15) for name in before)


def test_not_a_number_is_not_clipped_away() -> None:
    before = _arrays(1.0)
    after = {name: array.copy() for name, array in before.items()}
    after["a"][0, 0] = np.nan
    assert np.isnan(clipped(after, before, 1.0)["a"]).any()


@pytest.mark.parametrize("std", [0.01, 3.0])
def test_noise_is_gaussian_with_the_std_that_was_asked(std: float) -> None:
    draws = gaussian(200_001, std, SEED)
    assert draws.shape == (200_001,)
    assert draws.std() == pytest.approx(std, rel=0.01)
    assert abs(draws.mean()) < 5 * std / math.sqrt(draws.size)
    critical = 1.95 / math.sqrt(draws.size)  # one of a thousand true ones is further off
    assert _distance_from_normal(draws / std) < critical
    assert _distance_from_normal(1.04 * draws / std) > critical  # the control: 4 % off is seen
    assert abs(np.corrcoef(draws[:100_000], draws[100_000:200_000])[0, 1]) < 0.02


def test_noise_is_a_function_of_its_seed_and_fresh_each_time() -> None:
    assert np.array_equal(gaussian(9, 1.0, SEED), gaussian(9, 1.0, SEED))
    assert not np.array_equal(gaussian(9, 1.0, SEED), gaussian(9, 1.0, bytes(32)))
    arrays = _arrays(1.0)
    one, two = (noised(arrays, 1.0) for _ in "ab")
    assert {name: array.shape for name, array in one.items()} == {n: a.shape for n, a in arrays.items()}
    assert not any(np.array_equal(one[name], two[name]) for name in arrays)
    assert not np.array_equal(one["a"].ravel()[:7] - arrays["a"].ravel()[:7], one["b"] - arrays["b"])


def test_parts_of_many_clients_add_up() -> None:
    """k parts of z C / sqrt(k) are one noise of z C, whoever of more clients they come from."""
    parts = [noised({"a": np.zeros(20_000)}, 1.5 / math.sqrt(8))["a"] for _ in range(8)]
    assert np.sum(parts, axis=0).std() == pytest.approx(1.5, rel=0.03)
