"""Scenario files: what is wrong is told with its line and the cure; profiles follow from groups."""

from pathlib import Path
from typing import Any

import pytest

from tightbeam.common.errors import RecipeError
from tightbeam.federation.profiles import DEVICES, NETWORKS
from tightbeam.federation.scenario import Scenario, load_scenario, scenario_from_mapping

SMALL: dict[str, Any] = {"clients": 4, "rounds": 2}
PRIVATE = {"weight": "equal", "privacy": {"noise_multiplier": 1, "clipping_norm": 1}}
SCENARIOS = sorted(
    (Path(__file__).parents[2] / "simulations" / "tightbeam" / "simulations" / "scenarios").glob("*.yaml")
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"roundz": 3}, "unknown key roundz. Did you mean rounds?"),
        ({"partition": {"alhpa": 1}}, "Did you mean partition.alpha?"),
        ({"groups": {"a": {"clients": 1, "cutt": "1:1"}}}, "Did you mean groups.cut?"),
        ({"client": {"network": "4h"}}, "no network is called '4h'"),
        ({"client": {"device": "laptpo"}}, "known are phone, laptop, desktop, gpu"),
        ({"client": {"cut": "four"}}, "client.cut should be k:m"),
        ({"sample": 5}, "sample is 5, but there are 4 clients"),
        ({"groups": {"a": {"clients": 5}}}, "the groups have 5 clients, but there are 4"),
        ({"groups": {"a": {"clients": 1, "r": 2}}}, "fedit needs one rank, not [2, 8]: use flexlora"),
        (
            {"groups": {"a": {"clients": 1, "cut": "2:2"}}, "strategy": {"name": "fedadam"}},
            "fedadam needs one cut",
        ),
        ({"strategy": {"name": "krum", "num_malicious": 1}}, "krum needs at least 2 * num_malicious + 3"),
        ({"strategy": {"name": "flora", "secure": True}}, "strategy.secure goes with fedit, ffa, fedavgm"),
        (
            {"client": {"budget": {"mb": 1, "degrade": ["int8"]}}, "strategy": {"secure": True}},
            "strategy.secure goes without budget.degrade",
        ),
        ({"strategy": {"name": "fedit", "privacy": {"clipping_norm": 1}}}, "noise_multiplier is missing"),
        ({"client": {"mode": "sid"}}, "side"),
        ({"client": {"mode": "side"}, "strategy": {"name": "flora"}}, "mode side, client.share and"),
        ({"client": {"share": "top"}, "strategy": {"name": "flora"}}, "use flexlora"),
        (
            {
                "client": {"share": "top"},
                "groups": {"a": {"clients": 1, "r": 2}},
                "strategy": {"name": "ffa"},
            },
            "ffa with mixed ranks folds",
        ),
        ({"train": {"freeze_bottom_after": 1}, "strategy": {"name": "flora"}}, "need as they are"),
        ({"client": {"share": "none"}, "strategy": {"name": "krum"}}, "leaves nothing to combine"),
        ({"client": {"share": "none"}, "strategy": {"secure": True}}, "leaves nothing to combine"),
        ({"train": {"freeze_bottom_after": 1}, "strategy": {"name": "fedadam"}}, "momentum would move"),
        (
            {"groups": {"a": {"clients": 1, "cut": "2:2"}}, "strategy": PRIVATE},
            "strategy.privacy needs one cut, mode and share",
        ),
        ({"train": {"freeze_bottom_after": 2}}, "freeze_bottom_after is 2, but there are 2 rounds"),
        ({"train": {"noise": 0.5}}, "train.noise is for mode top, and for ushape with"),
        ({"train": {"noise": 0.5}, "client": {"mode": "side"}}, "train.noise is for mode top"),
        (
            {"groups": {"a": {"clients": 1, "mode": "side"}}, "strategy": {"name": "krum"}},
            "one cut, mode and",
        ),
        (
            {"groups": {"a": {"clients": 1, "share": "top"}}, "strategy": {"secure": True}},
            "one cut, mode and",
        ),
        ({"rounds": 0}, "rounds should be at least 1, not 0"),
        ({"client": {"network": {"up_mbps": 1, "down_mbps": 1, "rtt_ms": 1, "loss": 1}}}, "less than 1"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_a_wrong_scenario_is_told_in_plain_words(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        scenario_from_mapping(SMALL | change)
    assert said in str(caught.value)
    assert "docs/federation.md" in caught.value.cure
    assert caught.value.exit_code == 2


def test_an_error_names_file_and_line_or_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("clients: 4\nrounds: 2\ntrain:\n  stepz: 3\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"{path}:4: unknown key train.stepz"):
        load_scenario(path)
    path.write_text("clients: 4\nrounds: 2\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"--set train\.steps=no"):
        load_scenario(path, ["train.steps=no"])
    with pytest.raises(RecipeError, match="Cannot read the scenario"):
        load_scenario(tmp_path / "absent.yaml")
    (tmp_path / "empty.yaml").write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"is empty, not keys and values\. Start from .*/scenarios/"):
        load_scenario(tmp_path / "empty.yaml")
    assert load_scenario(path, ["train.steps=7", "client.network=4g"]).train.steps == 7


def test_groups_take_clients_in_order_and_change_only_what_they_say() -> None:
    groups = {"gpu": {"clients": 1, "cut": "8:8", "device": "gpu"}, "phone": {"clients": 2, "network": "4g"}}
    scenario = scenario_from_mapping(SMALL | {"client": {"cut": "2:2", "mode": "top"}, "groups": groups})
    profiles = scenario.profiles()
    assert [p.name for p in profiles] == ["client-00", "client-01", "client-02", "client-03"]
    assert [p.group for p in profiles] == ["gpu", "phone", "phone", ""]
    assert [p.options.cut for p in profiles] == ["8:8", "2:2", "2:2", "2:2"]
    assert {p.options.mode for p in profiles} == {"top"}
    assert profiles[0].options.device == DEVICES["gpu"]
    assert profiles[1].options.network == NETWORKS["4g"]
    assert profiles[3].options.network == NETWORKS["home"]


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_reads_and_survives_json(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.output.name == path.stem
    assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_numbers_leave_out_what_does_not_change_the_adapter() -> None:
    scenario = scenario_from_mapping(SMALL)
    moved = scenario_from_mapping(SMALL | {"cloud": {"address": "a:1"}, "output": {"name": "b"}})
    assert scenario.numbers() == moved.numbers()
    assert scenario.numbers() != scenario_from_mapping(SMALL | {"seed": 1}).numbers()


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, 5),
        ({"mode": "top"}, 3),
        ({"mode": "side"}, 5),
        ({"mode": "side", "side": {"adapt_bottom": False}}, 3),
        ({"share": "top"}, 3),
        ({"share": "none"}, 0),
    ],
    ids=str,
)
def test_blocks_whose_adapters_are_shared(options: dict[str, Any], blocks: int) -> None:
    scenario = scenario_from_mapping(SMALL | {"client": {"cut": "2:3", **options}})
    assert scenario.client.shared_blocks == blocks


def test_noise_goes_with_some_client_of_mode_top_or_a_freeze() -> None:
    some: dict[str, Any] = {"groups": {"a": {"clients": 1, "mode": "top"}}, "train": {"noise": 0.5}}
    late: dict[str, Any] = {"train": {"noise": 0.5, "freeze_bottom_after": 1}}
    assert all(scenario_from_mapping(SMALL | change).train.noise == 0.5 for change in (some, late))
