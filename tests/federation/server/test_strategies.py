"""Every strategy on the same small federation: contracts, exactness, mixed shapes."""

from typing import Any

import numpy as np
import pytest

from support.federations import Playground
from tightbeam.edge.report.meter import read_ledger
from tightbeam.federation.scenario import FLOWER_STRATEGIES, Scenario

OURS = ("fedit", "ffa", "flora", "flexlora", "hetlora", "zeropad")
MIXED = {"wide": {"clients": 1, "r": 8}, "narrow": {"clients": 1, "r": 2}}


def _delta(playground: Playground, scenario: Scenario, number: int) -> dict[str, np.ndarray]:
    """B @ A of every layer, folded updates included."""
    state = playground.state(scenario, number)
    deltas: dict[str, np.ndarray] = {}
    for name, A in state.items():
        if ".lora_A." in name:
            layer = name.removeprefix("global/learned/").removeprefix("global/folded/").split(".lora_A")[0]
            delta = state[name.replace(".lora_A.", ".lora_B.")] @ A
            deltas[layer] = deltas.get(layer, 0) + delta
    return deltas


@pytest.mark.parametrize("name", [*OURS, *FLOWER_STRATEGIES])
def test_every_strategy_learns(playground: Playground, name: str) -> None:
    extra = {"server_lr": 0.01} if name in ("fedadam", "fedyogi") else {}
    scenario = playground.scenario(strategy={"name": name, **extra}, train={"lr": 2e-2, "steps": 3})
    playground.run(scenario)
    first, last = playground.rows(scenario, "evaluation")
    assert last["loss"] < first["loss"] - 0.005
    assert last["worst"] >= last["median"] >= last["best"]
    assert (scenario.folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "exact"), [("flora", True), ("ffa", True), ("flexlora", False), ("fedit", False)]
)
def test_exactness_is_measured(playground: Playground, name: str, exact: bool) -> None:
    groups = {} if name == "fedit" else MIXED
    scenario = playground.scenario(strategy={"name": name}, groups=groups, train={"steps": 4, "lr": 3e-2})
    playground.run(scenario)
    errors = [row["relative_error"] for row in playground.rows(scenario, "round")]
    assert max(errors) <= 1e-7 if exact else max(errors) > 1e-4


def test_flora_equals_the_weighted_sum_of_what_clients_learned(playground: Playground) -> None:
    """One round from B = 0: delta W after it is what flexlora of full rank has, too, however it goes on."""
    changes: dict[str, Any] = {"rounds": 1, "groups": MIXED, "train": {"steps": 3, "lr": 3e-2}}
    fresh = playground.scenario(strategy={"name": "flora", "restart": "fresh"}, **changes)
    playground.run(fresh)
    flora = playground.scenario(strategy={"name": "flora"}, **changes)
    flexlora = playground.scenario(strategy={"name": "flexlora"}, **changes)
    playground.run(flora)
    playground.run(flexlora)
    exact, nearest = (_delta(playground, scenario, 1) for scenario in (flora, flexlora))
    distance = sum(float(np.linalg.norm(exact[layer] - nearest[layer]) ** 2) for layer in exact) ** 0.5
    size = sum(float(np.linalg.norm(delta) ** 2) for delta in exact.values()) ** 0.5
    assert all(np.allclose(exact[n], delta, atol=1e-9) for n, delta in _delta(playground, fresh, 1).items())
    reported = playground.rows(flexlora, "round")[0]["relative_error"]
    assert distance / size == pytest.approx(reported, rel=1e-3)
    assert size > 0


def test_ffa_keeps_a_and_sends_half(playground: Playground) -> None:
    scenario = playground.scenario(strategy={"name": "ffa"}, groups=MIXED)
    playground.run(scenario)
    before, after = playground.state(scenario, 1), playground.state(scenario, 2)
    assert all(np.array_equal(before[name], after[name]) for name in before if ".lora_A." in name)
    assert any(not np.array_equal(before[name], after[name]) for name in before if ".lora_B." in name)
    row = playground.rows(scenario, "client_round")[0]
    assert row["adapter_up_bytes"] < 0.7 * row["adapter_down_bytes"]


def test_clients_with_other_cuts_share_the_layers_that_they_have_in_common(playground: Playground) -> None:
    scenario = playground.scenario(
        rounds=1, groups={"deep": {"clients": 1, "cut": "2:2"}}, train={"steps": 3, "lr": 2e-2}
    )
    playground.run(scenario)
    deltas = _delta(playground, scenario, 1)
    blocks = {layer.split(".layers.")[1].split(".")[0] for layer in deltas}
    assert blocks == {"0", "1", "4", "5"}
    assert all(np.linalg.norm(delta) > 0 for delta in deltas.values())
    rows = {row["client"]: row for row in playground.rows(scenario, "client_round")}
    assert rows["client-00"]["adapter_up_bytes"] > 1.9 * rows["client-01"]["adapter_up_bytes"]


def test_layers_of_nobody_in_a_round_stay(playground: Playground) -> None:
    groups = {"deep": {"clients": 1, "cut": "2:2"}}
    scenario = playground.scenario(clients=4, rounds=2, sample=1, groups=groups, train={"lr": 2e-2})
    playground.run(scenario)
    assert playground.rows(scenario, "client_round")[-1]["client"] != "client-00"
    before, after = _delta(playground, scenario, 1), _delta(playground, scenario, 2)
    inner = [layer for layer in before if ".layers.1." in layer or ".layers.4." in layer]
    assert inner
    assert all(np.array_equal(before[layer], after[layer]) for layer in inner)


def test_in_mode_top_no_gradient_crosses_and_the_bottom_stays(playground: Playground) -> None:
    top = playground.scenario(client={"mode": "top"}, rounds=1)
    both = playground.scenario(rounds=1)
    playground.run(top)
    playground.run(both)
    one, other = (playground.rows(scenario, "client_round")[0] for scenario in (top, both))
    assert one["tokens"] == other["tokens"]
    assert 0 < one["payload_up_bytes"] * 2 <= other["payload_up_bytes"], "rows in common cross once"
    for scenario, row, kinds in ((top, one, {"forward"}), (both, other, {"forward", "backward"})):
        steps = read_ledger(scenario.folder / "clients/client-00/ledger.jsonl")
        assert {
            step["kind"] for step in steps if step["row"] == "step" and step["run"] == row["run"]
        } == kinds
    assert {layer.split(".layers.")[1].split(".")[0] for layer in _delta(playground, top, 1)} == {"5"}


def test_fedprox_pulls_towards_the_global_adapter(playground: Playground) -> None:
    free = playground.scenario(rounds=1, train={"steps": 6, "lr": 2e-2})
    held = playground.scenario(rounds=1, train={"steps": 6, "lr": 2e-2, "proximal": 100.0})
    playground.run(free)
    playground.run(held)

    def drift(scenario: Scenario) -> float:
        before, after = playground.state(scenario, 0), playground.state(scenario, 1)
        return sum(float(np.linalg.norm(after[name] - before[name]) ** 2) for name in before)

    assert drift(held) < 0.5 * drift(free)


def test_the_start_is_a_function_of_the_seed_alone(playground: Playground) -> None:
    ranks = {"wide": {"clients": 1, "r": 8}}
    one = playground.scenario(rounds=1, strategy={"name": "flexlora"}, groups=ranks)
    two = playground.scenario(rounds=1, strategy={"name": "hetlora"}, groups=ranks, train={"lr": 0.5})
    other = playground.scenario(rounds=1, strategy={"name": "hetlora"}, groups=ranks, seed=3)
    for scenario in (one, two, other):
        playground.run(scenario)
    first, second, third = (playground.state(scenario, 0) for scenario in (one, two, other))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert any(not np.array_equal(first[name], third[name]) for name in first)


def test_flower_adds_noise_and_clips_for_privacy(playground: Playground) -> None:
    quiet = playground.scenario(rounds=1)
    noisy = playground.scenario(
        rounds=1, strategy={"weight": "equal", "privacy": {"noise_multiplier": 1.0, "clipping_norm": 0.1}}
    )
    playground.run(quiet)
    playground.run(noisy)
    before, plain, private = (
        playground.state(quiet, 0),
        playground.state(quiet, 1),
        playground.state(noisy, 1),
    )
    untouched = [name for name in before if np.array_equal(plain[name], before[name])]
    assert not any(np.array_equal(private[name], before[name]) for name in before)
    assert not untouched
