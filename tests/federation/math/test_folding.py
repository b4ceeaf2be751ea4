"""Rounds in which each client wears its rank of what was learned and folds the rest: exact, for all ranks."""

import numpy as np
import pytest
from numpy.typing import NDArray

from support.lora_states import LAYERS
from tightbeam.federation.math import (
    FfaLora,
    Flora,
    LoraAdapter,
    Update,
    ZeroPadding,
    beyond,
    fold,
    kept,
    on_shared_A,
    parse_adapter,
    plus,
    principal,
)
from tightbeam.federation.math.lowrank import difference_norm

Q_PROJ, DOWN_PROJ = LAYERS
RANKS, WIDEST = [4, 8, 16], 16
Dense = dict[str, NDArray[np.float64]]


def start() -> LoraAdapter:
    probe = {}
    for layer, (num_out, num_in) in LAYERS.items():
        probe[f"{layer}.lora_A.weight"] = np.zeros((1, num_in))
        probe[f"{layer}.lora_B.weight"] = np.zeros((num_out, 1))
    return parse_adapter(probe, 1.0, "the server").restarted(WIDEST, 0)


def dense(adapter: LoraAdapter) -> Dense:
    return {layer: module.delta_w() for layer, module in adapter.modules.items()}


def held(whole: LoraAdapter, worn: LoraAdapter, rank: int) -> Dense:
    """What a client's weights are beyond the backbone's: what it folded and what it wears."""
    folded = dense(beyond(whole, rank))
    return {layer: delta + folded.get(layer, 0.0) for layer, delta in dense(worn).items()}


def trained(whole: LoraAdapter, rank: int, client: int, number: int) -> Update:
    """Local steps from what this client was sent: every factor moves."""
    rng, scale = np.random.default_rng([client, number]), 16 / rank
    state = whole.resized(rank, number).state(scale)
    moved = {
        name: array + rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in state.items()
    }
    return Update(f"client-{client}", client + 1.0, moved, scale)


def mean_of_weights(whole: LoraAdapter, updates: list[Update]) -> Dense:
    """By the definition: the weighted mean of all that the clients' weights hold after their steps."""
    total, mean = (
        sum(update.weight for update in updates),
        {layer: np.zeros(LAYERS[layer]) for layer in LAYERS},
    )
    for update in updates:
        worn = parse_adapter(update.adapter, update.scale, update.client)
        for layer, delta in held(whole, worn, worn.rank).items():
            mean[layer] += update.weight / total * delta
    return mean


def distance(left: Dense, right: Dense) -> float:
    error, norm = (
        [np.linalg.norm(one[layer]) for layer in LAYERS] for one in (subtracted(left, right), right)
    )
    return float(np.linalg.norm(error) / np.linalg.norm(norm))


def subtracted(left: Dense, right: Dense) -> Dense:
    return {layer: left[layer] - right[layer] for layer in LAYERS}


def test_five_rounds_with_mixed_ranks_are_the_weighted_mean_of_all_that_clients_hold() -> None:
    whole = start()
    for number in range(5):
        updates = [trained(whole, rank, k, number) for k, rank in enumerate(RANKS)]
        exact = mean_of_weights(whole, updates)
        blind = principal(Flora().aggregate(updates).mean, WIDEST)
        biased = plus(kept(whole, updates), ZeroPadding().aggregate(updates).adapter)
        if number:
            assert distance(dense(blind), exact) > 0.1, "what clients folded is a part of the mean"
        assert distance(dense(biased), exact) > 0.1, "factors averaged one by one must be seen"
        whole = principal(plus(kept(whole, updates), Flora().aggregate(updates).mean), WIDEST, number)
        assert distance(dense(whole), exact) < 1e-12
    assert min(module.rank for module in whole.modules.values()) > WIDEST, "nothing would have been folded"


def test_clients_of_every_rank_start_from_the_whole_delta_w_in_float32() -> None:
    whole = principal(
        plus(start(), Flora().aggregate([trained(start(), 16, k, 1) for k in range(3)]).mean), WIDEST
    )
    for rank in (1, 4, 8, 16, 20):
        worn = parse_adapter(whole.resized(rank, 3).state(16 / rank), 16 / rank, "ward")
        sent = beyond(whole, rank).state(1.0)
        folded = parse_adapter(sent, 1.0, "ward") if sent else LoraAdapter({}, {})
        for layer, shape in LAYERS.items():
            weight = np.random.default_rng(0).normal(size=shape)
            effective = fold(weight, folded.modules[layer]) + worn.modules[layer].delta_w()
            exact = weight + whole.modules[layer].delta_w()
            np.testing.assert_allclose(effective, exact, rtol=0, atol=1e-6)
            truncated = weight + worn.modules[layer].delta_w()
            assert np.abs(truncated - exact).max() > 1e-3, "without the fold the difference must show"


def test_the_first_directions_are_the_best_of_their_rank() -> None:
    adapter = Flora().aggregate([trained(start(), rank, k, 1) for k, rank in enumerate(RANKS)]).mean
    whole = principal(adapter, 4)
    for layer, module in adapter.modules.items():
        values = np.linalg.svd(module.delta_w(), compute_uv=False)
        error = np.linalg.norm(whole.modules[layer].truncated(4).delta_w() - module.delta_w())
        assert error == pytest.approx(np.linalg.norm(values[4:]), rel=1e-9)
    assert difference_norm(whole, adapter) < 1e-12


def test_directions_that_nobody_has_learned_are_fresh_and_never_folded() -> None:
    adapter = parse_adapter(trained(start(), 4, 0, 1).adapter, 1.0, "ward")
    whole = principal(adapter, 10, seed=5)
    for module in whole.modules.values():
        assert module.rank == 10
        assert module.A_RI[4:].any(axis=1).all()
        assert not module.B_OR[:, 4:].any()
    assert {module.rank for module in beyond(whole, 2).modules.values()} == {2}
    assert beyond(whole, 4).modules == beyond(start(), 0).modules == {}


def test_a_direction_is_kept_by_those_who_did_not_wear_it() -> None:
    updates = [trained(start(), rank, k, 1) for k, rank in enumerate(RANKS)]  # weights 1, 2, 3
    ones = start()
    for module in ones.modules.values():
        module.B_OR[:] = 1.0
    for module in kept(ones, updates).modules.values():
        expected = np.repeat([0.0, 1 / 6, 3 / 6], [4, 4, 8])
        np.testing.assert_allclose(module.B_OR, np.broadcast_to(expected, module.B_OR.shape))


def test_ffa_keeps_what_clients_of_smaller_ranks_folded() -> None:
    whole = start()
    for number in range(3):
        updates = []
        for k, rank in enumerate(RANKS):
            state = whole.resized(rank).state(2.0)
            rng = np.random.default_rng([number, k])
            moved = {
                n: a + rng.normal(0, 0.1, a.shape).astype(a.dtype) * ("_B" in n) for n, a in state.items()
            }
            updates.append(Update(f"client-{k}", k + 1.0, moved, 2.0))
        exact, mean = mean_of_weights(whole, updates), FfaLora().aggregate(updates).adapter
        if number:
            assert distance(dense(mean), exact) > 0.1, "ffa alone takes directions that are not worn for zero"
        after = on_shared_A(whole, updates, mean)
        assert distance(dense(after), exact) < 1e-6  # A crossed in float32
        assert all(after.modules[layer].A_RI is whole.modules[layer].A_RI for layer in LAYERS)
        whole = after


def test_a_round_of_narrow_clients_leaves_the_wide_directions_of_ffa() -> None:
    whole = start()
    for module in whole.modules.values():
        module.B_OR[:] = 1.0
    state = whole.resized(4).state(1.0)
    narrow = Update("narrow", 1.0, {name: array * (1 + ("_B" in name)) for name, array in state.items()}, 1.0)
    after = on_shared_A(whole, [narrow], FfaLora().aggregate([narrow]).adapter)
    for module in after.modules.values():
        np.testing.assert_allclose(module.B_OR[0], [2.0] * 4 + [1.0] * 12)


def test_a_layer_of_one_side_only_stays_in_the_sum() -> None:
    left, right = start(), parse_adapter(trained(start(), 4, 0, 1).adapter, 1.0, "ward")
    half = LoraAdapter({Q_PROJ: right.modules[Q_PROJ]}, {})
    total = plus(left, half)
    np.testing.assert_allclose(total.modules[Q_PROJ].delta_w(), half.modules[Q_PROJ].delta_w())
    assert total.modules[DOWN_PROJ] is left.modules[DOWN_PROJ]
