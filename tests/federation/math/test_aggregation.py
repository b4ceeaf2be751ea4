"""One contract for all aggregators; exact where they say so, and measurably not where they do not."""

import numpy as np
import pytest

from support.lora_states import (
    HEAD,
    LAYERS,
    dense_mean,
    frozen_A_updates,
    random_state,
    random_updates,
)
from tightbeam.common.errors import CohortError, UpdateRefusedError
from tightbeam.federation.math import (
    AGGREGATORS,
    Aggregate,
    FedIT,
    FfaLora,
    FlexLora,
    Flora,
    HetLora,
    Update,
    ZeroPadding,
    aggregator_named,
    fold,
    parse_adapter,
    self_pruned_rank,
)

Q_PROJ, DOWN_PROJ = LAYERS
MIXED = [16, 4, 8]


def updates_for(name: str) -> list[Update]:
    """Three clients as the aggregator wants them."""
    if name == "ffa":
        return frozen_A_updates(MIXED)
    return random_updates([8, 8, 8] if name == "fedit" else MIXED)


def dense_error(result: Aggregate, updates: list[Update]) -> float:
    """The relative Frobenius error by its definition, on full matrices."""
    mean = dense_mean(updates)
    error = [np.linalg.norm(result.adapter.modules[layer].delta_w() - mean[layer]) for layer in mean]
    return float(np.linalg.norm(error) / np.linalg.norm([np.linalg.norm(mean[layer]) for layer in mean]))


@pytest.mark.parametrize("name", AGGREGATORS)
class TestContract:
    def test_reports_its_error_truly(self, name: str) -> None:
        updates = updates_for(name)
        result = aggregator_named(name).aggregate(updates)
        assert result.relative_error() == pytest.approx(dense_error(result, updates), rel=1e-6, abs=1e-9)
        assert result.notes

    def test_one_client_gets_back_what_it_sent(self, name: str) -> None:
        (update,) = updates_for(name)[:1]
        result = aggregator_named(name).aggregate([update])
        assert result.relative_error() < 1e-9
        read_back = parse_adapter(result.state(update.scale), update.scale, "ward")
        sent = parse_adapter(update.adapter, update.scale, "ward")
        for layer in LAYERS:
            np.testing.assert_allclose(
                read_back.modules[layer].delta_w(), sent.modules[layer].delta_w(), atol=1e-4
            )

    def test_the_order_of_the_clients_does_not_matter(self, name: str) -> None:
        updates = updates_for(name)
        one, other = (aggregator_named(name).aggregate(order) for order in (updates, updates[::-1]))
        for layer in LAYERS:
            np.testing.assert_allclose(
                one.adapter.modules[layer].delta_w(), other.adapter.modules[layer].delta_w(), atol=1e-9
            )

    def test_only_the_ratio_of_weights_matters(self, name: str) -> None:
        updates = updates_for(name)
        scaled = [Update(u.client, u.weight * 1000, u.adapter, u.scale) for u in updates]
        one, other = (aggregator_named(name).aggregate(these) for these in (updates, scaled))
        for layer in LAYERS:
            np.testing.assert_allclose(
                one.adapter.modules[layer].delta_w(), other.adapter.modules[layer].delta_w(), atol=1e-9
            )

    def test_the_rest_is_the_weighted_mean(self, name: str) -> None:
        updates = updates_for(name)
        expected = np.average([u.adapter[HEAD] for u in updates], axis=0, weights=[1, 2, 3])
        result = aggregator_named(name).aggregate(updates)
        np.testing.assert_allclose(result.adapter.rest[HEAD], expected, rtol=1e-6)

    def test_gives_each_rank_a_valid_file(self, name: str) -> None:
        result = aggregator_named(name).aggregate(updates_for(name))
        for rank in (4, 8, 40):
            state = result.state(scale=16 / rank, rank=rank)
            assert state[f"{Q_PROJ}.lora_A.weight"].shape == (rank, 32)
            assert state[f"{Q_PROJ}.lora_B.weight"].shape == (24, rank)
            assert all(tensor.dtype == np.float32 for tensor in state.values())
        assert result.relative_error(40) == pytest.approx(result.relative_error(), abs=1e-12)

    def test_is_deterministic(self, name: str) -> None:
        one, other = (aggregator_named(name).aggregate(updates_for(name)).state(1.0) for _ in range(2))
        for tensor_name, tensor in one.items():
            np.testing.assert_array_equal(tensor, other[tensor_name])

    def test_nobody_has_learned_anything(self, name: str) -> None:
        untrained = frozen_A_updates([4, 4])
        zeroed = [
            Update(u.client, u.weight, {k: v * ("lora_B" not in k) for k, v in u.adapter.items()}, u.scale)
            for u in untrained
        ]
        result = aggregator_named(name).aggregate(zeroed)
        assert result.relative_error() == 0.0
        state = result.state(1.0, rank=4)
        assert np.all(state[f"{Q_PROJ}.lora_A.weight"].any(axis=1)), "a direction that can never learn"

    def test_nobody_is_an_error(self, name: str) -> None:
        with pytest.raises(CohortError, match="no update"):
            aggregator_named(name).aggregate([])

    def test_the_odd_client_is_named_even_if_it_comes_first(self, name: str) -> None:
        updates = updates_for(name)
        odd = {key: value for key, value in updates[0].adapter.items() if not key.startswith(DOWN_PROJ)}
        updates[0] = Update("client-0", 1.0, odd, 1.0)
        with pytest.raises(UpdateRefusedError, match=f"client-0 is refused: {DOWN_PROJ} is missing"):
            aggregator_named(name).aggregate(updates)

    def test_a_value_that_is_no_number_is_named(self, name: str) -> None:
        updates = updates_for(name)
        spoiled = {key: value.copy() for key, value in updates[1].adapter.items()}
        spoiled[f"{Q_PROJ}.lora_B.weight"][0, 0] = np.nan
        updates[1] = Update("client-1", 1.0, spoiled, 1.0)
        with pytest.raises(UpdateRefusedError, match=r"client-1 is refused: .*q_proj.lora_B.weight holds 1"):
            aggregator_named(name).aggregate(updates)

    def test_a_client_counts_once(self, name: str) -> None:
        (update,) = updates_for(name)[:1]
        with pytest.raises(UpdateRefusedError, match="client-0 handed in 2 updates"):
            aggregator_named(name).aggregate([update, update])


@pytest.mark.parametrize("name", ["ffa", "flora"])
def test_the_exact_ones_are_exact_for_mixed_ranks_and_scales(name: str) -> None:
    updates = updates_for(name)
    result = aggregator_named(name).aggregate(updates)
    assert result.relative_error() < 1e-12
    assert dense_error(result, updates) < 1e-12
    mean = dense_mean(updates)
    written = parse_adapter(result.state(scale=0.25), 0.25, "ward")  # through a float32 file
    for layer in LAYERS:
        assert np.linalg.norm(written.modules[layer].delta_w() - mean[layer]) < 1e-5 * np.linalg.norm(
            mean[layer]
        )


@pytest.mark.parametrize("name", ["fedit", "hetlora", "zeropad"])
def test_the_biased_ones_differ(name: str) -> None:
    """The negative control: a test of exactness that these passed would test nothing."""
    updates = updates_for(name)
    result = aggregator_named(name).aggregate(updates)
    assert dense_error(result, updates) > 0.1
    assert "biased" in result.notes[0]


def test_fedit_is_exact_while_all_share_a() -> None:
    assert FedIT().aggregate(frozen_A_updates([8, 8, 8])).relative_error() < 1e-12


def test_ignoring_the_scale_would_be_seen() -> None:
    """Mixed ranks under one alpha have mixed scales: as if all were equal, the result is another one."""
    updates = random_updates(MIXED)
    blind = [Update(u.client, u.weight, u.adapter, 1.0) for u in updates]
    result = Flora().aggregate(blind)
    assert dense_error(result, blind) < 1e-12
    assert dense_error(result, updates) > 0.1


def test_flexlora_is_the_best_of_its_rank() -> None:
    """Eckart-Young: no matrix of that rank is closer than the sum of the singular values left out."""
    updates = random_updates(MIXED)
    mean = dense_mean(updates)
    result = FlexLora().aggregate(updates)
    assert result.adapter.rank == 16
    for rank in (2, 4, 8, 16):
        left_out = [np.linalg.svd(dense, compute_uv=False)[rank:] for dense in mean.values()]
        optimum = np.linalg.norm(np.concatenate(left_out)) / np.linalg.norm(
            np.concatenate([dense.ravel() for dense in mean.values()])
        )
        assert result.relative_error(rank) == pytest.approx(optimum, rel=1e-9)
        fixed = FlexLora(rank).aggregate(updates)
        assert fixed.relative_error() == pytest.approx(optimum, rel=1e-9)
    assert FlexLora(28).aggregate(updates).relative_error() < 1e-12  # the rank of the sum: nothing left out


def test_flexlora_fixes_the_signs_that_a_decomposition_leaves_open() -> None:
    for module in FlexLora().aggregate(random_updates(MIXED)).adapter.modules.values():
        peaks = module.A_RI[np.arange(module.rank), np.abs(module.A_RI).argmax(axis=1)]
        assert np.all(peaks > 0)


def test_flexlora_beats_the_biased_ones_at_their_own_rank() -> None:
    updates = random_updates(MIXED)
    best = FlexLora().aggregate(updates).relative_error()
    assert best < min(
        other.aggregate(updates).relative_error() for other in (ZeroPadding(), HetLora(), FlexLora(8))
    )


def test_flora_folds_to_the_same_weights() -> None:
    updates, rng = random_updates(MIXED), np.random.default_rng(0)
    result, mean = Flora().aggregate(updates), dense_mean(updates)
    assert result.folds
    assert result.adapter.rank == sum(MIXED)
    for layer, shape in LAYERS.items():
        weight = rng.normal(size=shape)
        np.testing.assert_allclose(fold(weight, result.adapter.modules[layer]), weight + mean[layer])
    assert not result.adapter.restarted(8).modules[Q_PROJ].delta_w().any()


def test_hetlora_weighs_by_what_was_learned() -> None:
    loud, quiet = random_updates([4, 4])
    quiet = Update(
        "quiet", 1e6, {k: v * (0.0 if "lora_B" in k else 1.0) for k, v in quiet.adapter.items()}, 4.0
    )
    result = HetLora().aggregate([loud, quiet])  # a million examples, but nothing learned
    sent = parse_adapter(loud.adapter, loud.scale, "loud")
    np.testing.assert_allclose(
        result.adapter.modules[Q_PROJ].delta_w(), sent.modules[Q_PROJ].delta_w(), rtol=1e-9
    )


def test_fedit_refuses_mixed_ranks_and_names_the_way_out() -> None:
    with pytest.raises(UpdateRefusedError, match=r"client-1 .* rank 4, not 8 .* use flora or flexlora"):
        FedIT().aggregate(random_updates([8, 4]))


def test_ffa_refuses_a_moved_a() -> None:
    updates = frozen_A_updates([8, 4])
    moved = dict(updates[1].adapter)
    moved[f"{DOWN_PROJ}.lora_A.weight"] = moved[f"{DOWN_PROJ}.lora_A.weight"] * np.float32(1.0001)
    updates[1] = Update("client-1", 1.0, moved, 4.0)
    with pytest.raises(UpdateRefusedError, match=r"client-1 .*down_proj.lora_A.weight is not the shared"):
        FfaLora().aggregate(updates)


def test_dora_is_told_apart() -> None:
    (update,) = random_updates([4])
    magnitude = {f"{Q_PROJ}.lora_magnitude_vector": np.ones(24, np.float32)}
    result = Flora().aggregate([Update("ward", 1.0, {**update.adapter, **magnitude}, 1.0)])
    assert any("DoRA" in note for note in result.notes)


def test_self_pruning_cuts_a_tail_that_fell() -> None:
    before = parse_adapter(random_state(8), 1.0, "ward")
    state = random_state(8)
    for layer in LAYERS:
        state[f"{layer}.lora_B.weight"][:, 6:] *= np.float32(0.5)
    fallen = parse_adapter(state, 1.0, "ward")
    assert self_pruned_rank(before, fallen, keep=0.75) == 6
    assert self_pruned_rank(fallen, before, keep=0.75) == 8
