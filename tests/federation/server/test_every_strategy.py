"""Every strategy with every option: a round goes through where the scenario is taken, on each runtime."""

import importlib.util
import itertools
from typing import Any

import numpy as np
import pytest

from support.federations import Playground, Signed
from tightbeam.common.errors import RecipeError
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.scenario import FLOWER_STRATEGIES, scenario_from_mapping
from tightbeam.simulations.client_app import app
from tightbeam.simulations.engines import run_on_ray

HAS_RAY = importlib.util.find_spec("ray") is not None
OURS = ("fedit", "ffa", "flora", "flexlora", "hetlora", "zeropad")
PRIVACY = {"noise_multiplier": 0.1, "clipping_norm": 0.5}
LADDER = {"mode": "side", "side": {"taps": 2, "width": 8, "heads": 2}}


def _private(**more: str) -> dict[str, Any]:
    return {"strategy": {"weight": "equal", "privacy": PRIVACY | more}}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "secure": {"strategy": {"secure": True}},
    "clipped-at-server": _private(where="server"),
    "clipped-at-client": _private(where="client"),
    "adaptive-at-server": _private(where="server", clipping="adaptive"),
    "adaptive-at-client": _private(where="client", clipping="adaptive"),
    "secure-and-private": {"strategy": _private(where="client")["strategy"] | {"secure": True}},
    "mixed-ranks": {"groups": {"narrow": {"clients": 1, "r": 2}}},
    "top-only": {"client": {"mode": "top"}},
    "ladder": {"client": LADDER},
    "personal": {"client": {"share": "top"}},
    "frozen": {"rounds": 2, "train": {"freeze_bottom_after": 1}},
}


def _taken(name: str, option: str) -> bool:
    section = {"clients": 3, "rounds": 1, **OPTIONS[option]}
    section["strategy"] = {**section.get("strategy", {}), "name": name}
    try:
        scenario_from_mapping(section)
    except RecipeError:
        return False
    return True


ALL = list(itertools.product((*OURS, *FLOWER_STRATEGIES), OPTIONS))
TAKEN = [pair for pair in ALL if _taken(*pair)]
# Each strategy, each option with one of ours and one of Flower's, and what a strategy does in its own way.
QUICK = {
    (name, option)
    for name, option in TAKEN
    if option in ("plain", "mixed-ranks")
    or name in ("fedit", "fedavgm")
    or (name, option) in (("flora", "top-only"), ("ffa", "frozen"))
}


def test_no_strategy_and_no_option_is_refused_altogether() -> None:
    assert {name for name, _ in TAKEN} == {*OURS, *FLOWER_STRATEGIES}
    assert {option for _, option in TAKEN} == set(OPTIONS)


@pytest.mark.parametrize(
    ("runtime", "name", "option"),
    [
        *(
            pytest.param("in-process", *pair, marks=[] if pair in QUICK else [pytest.mark.slow])
            for pair in TAKEN
        ),
        *(
            pytest.param(
                "ray",
                *pair,
                marks=[
                    pytest.mark.slow,
                    pytest.mark.skipif(not HAS_RAY, reason="the extra ray is not installed"),
                ],
            )
            for pair in TAKEN
        ),
    ],
)
def test_a_round_goes_through(
    request: pytest.FixtureRequest, playground: Playground, runtime: str, name: str, option: str
) -> None:
    changes = {"rounds": 1, **OPTIONS[option]}
    changes["strategy"] = {**changes.get("strategy", {}), "name": name}
    changes["train"] = {"steps": 1, **changes.get("train", {})}
    if changes["strategy"].get("secure"):
        signed: Signed = request.getfixturevalue("signed")
        playground, scenario = signed.playground, signed.scenario(**{"clients": 3, **changes})
    else:
        scenario = playground.scenario(eval_sample=1, **changes)
    if runtime == "ray":
        run_on_ray(RunConfig(scenario, playground.address, scenario.cloud.identities, scenario.folder))
    else:
        playground.run_with(scenario, app)
    rows = playground.rows(scenario, "client_round")
    assert [row["status"] for row in rows] == ["ok"] * 3 * scenario.rounds, rows
    assert [row["updates"] for row in playground.rows(scenario, "round")] == [3] * scenario.rounds
    before, after = playground.state(scenario, scenario.rounds - 1), playground.state(scenario)
    assert any(tensor not in before or not np.array_equal(after[tensor], before[tensor]) for tensor in after)
    assert all(np.isfinite(array).all() for array in after.values())
