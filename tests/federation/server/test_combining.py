"""How a round's updates become the next adapter: by groups of layers, by Flower's strategies, from a mean."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict

from tightbeam.federation.contract.records import to_record
from tightbeam.federation.math import LoraAdapter, Update, beyond, parse_adapter
from tightbeam.federation.runtimes.grid import InProcessGrid
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.federation.server.combining import (
    Accepted,
    ByAggregator,
    ByFlower,
    Combiner,
    combiner_for,
    trained_part,
)
from tightbeam.federation.server.global_adapter import GlobalAdapter

RANK, SCALE = 2, 2.0


def _nobody(message: Message, context: Context) -> Message:
    raise AssertionError("no client is asked here")


@pytest.fixture(autouse=True)
def grid() -> InProcessGrid:
    """Flower's messages want a run to belong to."""
    return InProcessGrid(_nobody, 3, {})


def _scenario(name: str, **changes: Any) -> Scenario:
    return scenario_from_mapping(
        {"clients": 3, "rounds": 2, "client": {"r": RANK}, "strategy": {"name": name, **changes}}
    )


def _arrays(seed: int, *layers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for layer in layers:
        found[f"m.layers.{layer}.q.lora_A.weight"] = rng.normal(size=(RANK, 6)).astype(np.float32)
        found[f"m.layers.{layer}.q.lora_B.weight"] = rng.normal(size=(5, RANK)).astype(np.float32)
    return found


def _state(arrays: dict[str, np.ndarray]) -> GlobalAdapter:
    return GlobalAdapter(parse_adapter(arrays, SCALE, "start"))


def _accepted(arrays: dict[str, np.ndarray], weight: int = 1, client: str = "c") -> Accepted:
    content = RecordDict({"arrays": to_record(arrays), "metrics": MetricRecord({"weight": weight})})
    layers = frozenset(parse_adapter(arrays, SCALE, client).modules)
    update = Update(client, weight, arrays, SCALE)
    return Accepted(update, layers, Message(content, 2, "train"))


def _round(combiner: Combiner, start: dict[str, np.ndarray], accepted: list[Accepted], grid: Any) -> Any:
    combiner.prepare(1, to_record(start), len(accepted), grid)
    return combiner.combine(1, _state(start), accepted).state.learned.state(SCALE)


# ------------------------------------------------------------------------------------------ groups


def test_a_layer_is_combined_among_those_who_have_it(grid: InProcessGrid) -> None:
    start = _arrays(0, 0, 1, 5)
    both, top = _arrays(1, 0, 5), _arrays(2, 5)
    accepted = [_accepted(both, 3, "a"), _accepted(top, 1, "b")]
    after = _round(combiner_for(_scenario("fedit"), None), start, accepted, grid)
    for name, array in after.items():
        if ".0." in name:
            expected = both[name]  # only one client has it
        elif ".1." in name:
            expected = start[name]  # nobody has it in this round
        else:
            expected = 0.75 * both[name] + 0.25 * top[name]
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-7)


def test_the_notes_of_groups_are_said_once_and_the_error_is_of_all_layers(grid: InProcessGrid) -> None:
    accepted = [_accepted(_arrays(1, 0, 5), 1, "a"), _accepted(_arrays(2, 5), 1, "b")]
    combiner = combiner_for(_scenario("fedit"), None)
    combined = combiner.combine(1, _state(_arrays(0, 0, 5)), accepted)
    assert len(combined.notes) == 1
    assert combined.relative_error is not None
    assert combined.relative_error > 0.1


def test_flora_folds_and_starts_afresh() -> None:
    start, update = _arrays(0, 5), _arrays(1, 5)
    scenario = _scenario("flora", restart="fresh")
    combined = combiner_for(scenario, None).combine(1, _state(start), [_accepted(update)])
    assert combined.state.folded is not None
    assert all(not module.B_OR.any() for module in combined.state.learned.modules.values())
    assert combined.relative_error == pytest.approx(0, abs=1e-9)


def _wide_start() -> GlobalAdapter:
    """Rank 5, of which clients wear 2: the rest is in their weights."""
    rng = np.random.default_rng(7)
    arrays = {}
    for layer in (0, 1, 5):
        arrays[f"m.layers.{layer}.q.lora_A.weight"] = rng.normal(size=(5, 6))
        arrays[f"m.layers.{layer}.q.lora_B.weight"] = rng.normal(size=(5, 5))
    return GlobalAdapter(parse_adapter(arrays, SCALE, "start"))


def test_flora_goes_on_from_principal_directions_layer_by_layer() -> None:
    """Layer 0 is one client's, layer 1 nobody's, layer 5 two clients'; what they folded is in the mean."""
    state = _wide_start()
    both, top = _arrays(1, 0, 5), _arrays(2, 5)
    accepted = [_accepted(both, 3, "a"), _accepted(top, 1, "b")]
    combined = combiner_for(_scenario("flora"), None).combine(1, state, accepted)
    before = {name: module.delta_w() for name, module in state.learned.modules.items()}
    folded = {name: m.delta_w() for name, m in beyond(state.learned, RANK).modules.items()}
    one, two = (
        {name: m.delta_w() for name, m in parse_adapter(arrays, SCALE, "c").modules.items()}
        for arrays in (both, top)
    )
    expected = {
        "m.layers.0.q": folded["m.layers.0.q"] + one["m.layers.0.q"],
        "m.layers.1.q": before["m.layers.1.q"],
        "m.layers.5.q": folded["m.layers.5.q"] + 0.75 * one["m.layers.5.q"] + 0.25 * two["m.layers.5.q"],
    }
    after = {name: module.delta_w() for name, module in combined.state.learned.modules.items()}
    for name, delta in expected.items():
        np.testing.assert_allclose(after[name], delta, atol=1e-9)
        assert np.abs(folded[name]).max() > 0.1, "without what was folded the mean would be another"
    assert combined.state.folded is None
    assert combined.relative_error == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------------------ Flower's


def test_the_scenario_chooses_who_combines() -> None:
    assert isinstance(combiner_for(_scenario("flexlora"), None), ByAggregator)
    assert isinstance(combiner_for(_scenario("krum"), None), ByFlower)
    assert isinstance(combiner_for(_scenario("fedit", secure=True), None), ByAggregator)
    assert isinstance(combiner_for(_scenario("fedadam", secure=True), None), ByFlower)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_a_strategy_of_flowers_makes_the_same_of_the_mean_as_of_the_updates(
    name: str, grid: InProcessGrid
) -> None:
    start, updates = _arrays(0, 0, 5), [_arrays(seed, 0, 5) for seed in (1, 2, 3)]
    weights = [1, 2, 5]
    one, other = (combiner_for(_scenario(name, server_lr=0.1), None) for _ in "ab")
    seen = _round(one, start, [_accepted(u, w) for u, w in zip(updates, weights, strict=True)], grid)
    mean = {
        tensor: np.average([u[tensor] for u in updates], axis=0, weights=weights).astype(np.float32)
        for tensor in start
    }
    other.prepare(1, to_record(start), 3, grid)
    unseen = other.after_mean(_state(start), 1, mean).state.learned.state(SCALE)
    for tensor in start:
        np.testing.assert_allclose(unseen[tensor], seen[tensor], rtol=1e-4, atol=1e-5)


def test_by_momentum_the_second_round_goes_on_in_the_direction_of_the_first(grid: InProcessGrid) -> None:
    start = _arrays(0, 5)
    moved = {name: array + 1 for name, array in start.items()}
    combiner = combiner_for(_scenario("fedavgm", momentum=0.5), None)
    first = _round(combiner, start, [_accepted(moved)], grid)
    combiner.prepare(2, to_record(first), 1, grid)
    second = combiner.combine(2, _state(first), [_accepted(first)]).state.learned.state(SCALE)
    for name, array in second.items():
        np.testing.assert_allclose(array - first[name], 0.5, rtol=1e-4)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_what_a_server_optimizer_remembers_survives_a_restart(name: str, grid: InProcessGrid) -> None:
    start, moved = _arrays(0, 0, 5), _arrays(1, 0, 5)
    running, restarted = (combiner_for(_scenario(name, server_lr=0.1), None) for _ in "ab")
    first = _round(running, start, [_accepted(moved)], grid)
    memory = running.memory()
    assert memory
    restarted.remember(memory)
    forgetful = combiner_for(_scenario(name, server_lr=0.1), None)
    results = []
    for combiner in (running, restarted, forgetful):
        combiner.prepare(2, to_record(first), 1, grid)
        results.append(combiner.combine(2, _state(first), [_accepted(moved)]).state.learned.state(SCALE))
    assert all(np.array_equal(results[0][tensor], results[1][tensor]) for tensor in start)
    assert any(not np.array_equal(results[0][tensor], results[2][tensor]) for tensor in start)


def test_the_median_does_not_follow_one_liar(grid: InProcessGrid) -> None:
    start, honest = _arrays(0, 5), _arrays(1, 5)
    lie = {name: array + 1e6 for name, array in honest.items()}
    accepted = [_accepted(honest), _accepted(honest), _accepted(lie, 1000)]
    median = _round(combiner_for(_scenario("fedmedian"), None), start, accepted, grid)
    for name, array in median.items():
        np.testing.assert_allclose(array, honest[name], rtol=1e-5)


# ------------------------------------------------------------------------------------------ means, parts


def test_an_aggregators_mean_is_taken_as_it_is_and_other_layers_stay() -> None:
    start, mean = _arrays(0, 0, 5), _arrays(1, 5)
    combined = combiner_for(_scenario("fedit", secure=True), None).after_mean(_state(start), 1, mean)
    after = combined.state.learned.state(SCALE)
    assert combined.relative_error is None
    for name in start:
        np.testing.assert_allclose(after[name], mean.get(name, start[name]), rtol=1e-6)


@pytest.mark.parametrize(("name", "factors"), [("ffa", {"lora_B"}), ("fedit", {"lora_A", "lora_B"})])
def test_what_is_trained_of_what_is_sent(name: str, factors: set[str]) -> None:
    trained = trained_part(_arrays(0, 0, 5), _scenario(name))
    assert {tensor.split(".")[4] for tensor in trained} == factors


def test_nothing_shared_is_nothing_to_combine() -> None:
    section = {"clients": 3, "rounds": 1, "client": {"r": RANK, "share": "none"}}
    combiner = combiner_for(scenario_from_mapping(section), None)
    state = GlobalAdapter(LoraAdapter({}, {}))
    update = Accepted(Update("c", 1, {}, SCALE), frozenset(), Message(RecordDict(), 2, "train"))
    assert combiner.combine(1, state, [update]).state is state
