"""The same scenario on Flower's own engines gives the same adapter, to the last bit."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from support.federations import Playground
from tightbeam.common.errors import FederationError, RecipeError, UsageError
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.requirements import require_ray
from tightbeam.federation.runtimes.flower import app_files, flower_environment
from tightbeam.federation.scenario import Scenario
from tightbeam.simulations.engines import (
    run_deployed,
    run_on_ray,
)

EXAMPLE = Path(__file__).parents[3] / "examples" / "flower_app"
HAS_RAY = importlib.util.find_spec("ray") is not None
SMALL: dict[str, Any] = {
    "clients": 2,
    "rounds": 2,
    "eval_every": 1,
    "client": {"share": "top"},
    "groups": {"laptop": {"clients": 1, "mode": "side", "side": {"taps": 2, "width": 8, "heads": 2}}},
}


def _settings(playground: Playground, scenario: Scenario) -> RunConfig:
    return RunConfig(scenario, playground.address, None, scenario.folder)


def _require_equal(playground: Playground, one: Scenario, other: Scenario) -> None:
    left, right = playground.state(one), playground.state(other)
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)
    bytes_of = [
        [(row["adapter_down_bytes"], row["adapter_up_bytes"]) for row in playground.rows(s, "client_round")]
        for s in (one, other)
    ]
    assert bytes_of[0] == bytes_of[1]
    for path in sorted(one.folder.glob("clients/*/personal/*")):
        own, theirs = load_file(path), load_file(other.folder / path.relative_to(one.folder))
        assert all(np.array_equal(own[name], theirs[name]) for name in own), path.name
    assert path.name == "round-2.safetensors"


@pytest.mark.slow
def test_superlink_and_supernodes_give_the_same_adapter(playground: Playground) -> None:
    here, deployed = playground.scenario(**SMALL), playground.scenario(**SMALL)
    playground.run(here)
    run_deployed(_settings(playground, deployed))
    _require_equal(playground, here, deployed)
    assert not list((deployed.folder / "flower" / "keys").glob("*")), "node keys are for one run"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="the extra ray is not installed")
def test_ray_gives_the_same_adapter(playground: Playground) -> None:
    here, on_ray = playground.scenario(**SMALL), playground.scenario(**SMALL)
    playground.run(here)
    run_on_ray(_settings(playground, on_ray))
    _require_equal(playground, here, on_ray)


@pytest.mark.slow
def test_a_deployed_run_that_fails_says_why(playground: Playground) -> None:
    scenario = playground.scenario(
        **SMALL, train={"lr": 1e30, "optimizer": "sgd", "max_grad_norm": 0, "steps": 3}
    )
    with pytest.raises(FederationError, match="client-00 says"):
        run_deployed(_settings(playground, scenario))


@pytest.mark.skipif(HAS_RAY, reason="the extra ray is installed")
def test_without_ray_the_cure_is_one_command(playground: Playground) -> None:
    with pytest.raises(UsageError, match=r"needs the package ray\. Run `pip install"):
        require_ray()
    with pytest.raises(UsageError, match="needs the package ray"):
        run_on_ray(_settings(playground, playground.scenario()))


def test_the_example_is_the_project_that_is_run() -> None:
    for name, text in app_files("tightbeam.simulations.client_app").items():
        lines = (EXAMPLE / name).read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if not line.startswith("#")] == text.splitlines(), name
    assert {path.suffix for path in EXAMPLE.rglob("*") if path.is_file()} <= {".py", ".toml", ""}


def test_flower_is_kept_offline_and_in_its_own_home(tmp_path: Path) -> None:
    variables = flower_environment(tmp_path)
    assert variables["FLWR_HOME"] == str(tmp_path)
    assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
    assert variables["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_the_run_config_survives_flower_and_says_what_is_missing(playground: Playground) -> None:
    settings = _settings(playground, playground.scenario(groups={"a": {"clients": 1, "network": "4g"}}))
    assert RunConfig.of(settings.run_config()) == settings
    with pytest.raises(RecipeError, match="The run config has no cloud"):
        RunConfig.of({"scenario": "x.yaml"})
    with pytest.raises(RecipeError, match="partition-id 7; the scenario has 3 clients"):
        settings.profile({"partition-id": 7})
    with pytest.raises(RecipeError, match="partition-id None"):
        settings.profile({})
