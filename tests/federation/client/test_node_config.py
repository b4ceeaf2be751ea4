"""A node that stands for somebody refuses to start on what it was not given; nothing is made up for it."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from support.federations import Playground
from tightbeam.common.errors import RecipeError
from tightbeam.federation.client import client_app
from tightbeam.federation.client.node_config import node_section
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.runtimes.grid import ClientCall, InProcessGrid
from tightbeam.federation.server.replies import failure_of
from tightbeam.simulations import client_app as simulated_client_app

SIMULATED = {"partition-id": 0, "num-partitions": 3}


@pytest.fixture
def own(playground: Playground) -> dict[str, Any]:
    """A whole node config."""
    data = str(playground.data)
    return {"partition-id": 0, "identity": str(playground.folder), "train": data, "eval": data}


def _settings(playground: Playground, *, simulated: bool) -> RunConfig:
    scenario = playground.scenario(cloud={"insecure": False}, data={"source": "demo"})
    return RunConfig(scenario, playground.address, None, scenario.folder, simulated=simulated)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval": None}, "no eval"),
        ({"train": None}, "no train"),
        ({"identity": None}, "no identity"),
        ({"identity": None, "train": None, "eval": None}, "no train and no eval and no identity"),
        ({"eval": None, "evl": "x.jsonl"}, "evl"),
        ({"identty": "x"}, "identty"),
        ({"train": 7}, "train"),
        ({"eval": "nowhere.jsonl"}, "eval names nowhere.jsonl, which is not there"),
        ({"cloud": "cloud.example"}, "cloud"),
        ({"partition-id": True}, "partition-id True"),
        ({"partition-id": "0"}, "partition-id 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("simulated", [False, True])
@pytest.mark.parametrize("app", [client_app.app, simulated_client_app.app], ids=["production", "simulation"])
def test_every_key_is_checked_before_anything_is_read(
    playground: Playground,
    own: dict[str, Any],
    changes: dict[str, Any],
    said: str,
    simulated: bool,
    app: ClientCall,
) -> None:
    config = {key: value for key, value in (own | changes).items() if value is not None}
    if simulated and config.keys() == {"partition-id"}:
        pytest.skip("a simulated node may have no texts of its own")
    settings = _settings(playground, simulated=simulated)
    InProcessGrid(app, 1, {})  # messages are of a run, and it makes one
    context = Context(1, 2, config, RecordDict(), {**settings.run_config()})
    for kind in ("query.hello", "train"):
        reply = app(Message(RecordDict({"config": ConfigRecord()}), 2, kind), context)
        failure = failure_of(reply)
        assert isinstance(failure, RecipeError)
        assert said in str(failure)
        assert "--node-config" in str(failure)
    assert not settings.folder.exists(), "nothing was dealt out"


def test_what_is_whole_is_taken(playground: Playground, own: dict[str, Any]) -> None:
    for simulated in (False, True):
        found = node_section(own, _settings(playground, simulated=simulated))
        assert (found.train, found.eval) == (playground.data, playground.data)


def test_only_a_simulation_deals_out_data(playground: Playground) -> None:
    assert node_section(SIMULATED, _settings(playground, simulated=True)).train is None
    with pytest.raises(RecipeError, match="no train and no eval and no identity"):
        node_section(SIMULATED, _settings(playground, simulated=False))


def test_flowers_own_command_simulates_only_when_told(playground: Playground) -> None:
    """A run config that does not say so is a deployment's."""
    config = _settings(playground, simulated=True).run_config()
    assert RunConfig.of(config).simulated
    del config["simulated"]
    assert not RunConfig.of(config).simulated


@pytest.mark.parametrize(
    "module", ["tightbeam.federation.client.client_app", "tightbeam.simulations.client_app"]
)
def test_a_deployments_nodes_are_never_dealt_data(module: str) -> None:
    from tightbeam.federation.runtimes.flower import app_files

    assert "simulated = false" in app_files(module)["pyproject.toml"]
    assert f"from {module} import app" in app_files(module)["app/client_app.py"]
    for name in ("app/client_app.py", "app/server_app.py"):
        found: dict[str, Any] = {}
        exec(app_files(module)[name], found)  # what a node does with it
        assert callable(found["app"])
