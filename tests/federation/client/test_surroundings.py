"""What is simulated comes in through a client's surroundings: a real node rolls no dice and refuses to."""

import random
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from support.federations import Playground
from tightbeam.common.errors import RecipeError, TightbeamError
from tightbeam.federation.client import client_app
from tightbeam.federation.client.participant import Client
from tightbeam.federation.client.surroundings import RealSurroundings
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.runtimes.grid import ClientCall, InProcessGrid
from tightbeam.federation.runtimes.superlink import run_on_superlink
from tightbeam.federation.server.replies import failure_of
from tightbeam.simulations import client_app as simulated_client_app
from tightbeam.simulations.surroundings import SimulatedSurroundings

APPS = {"production": client_app.app, "simulation": simulated_client_app.app}
ASKED = [
    ({"faults": {"dropout": 0.1}}, {}, "faults.dropout"),
    ({"faults": {"straggler": 0.1}}, {}, "faults.straggler"),
    ({"faults": {"deadline_s": 5}}, {}, "faults.deadline_s"),
    ({}, {"shape": True}, "shape"),
]


def _run(playground: Playground, changes: dict[str, Any], **options: Any) -> RunConfig:
    scenario = playground.scenario(**changes)
    return RunConfig(scenario, playground.address, None, scenario.folder, **{"simulated": False} | options)


def _told(app: ClientCall, playground: Playground, run: RunConfig) -> TightbeamError | None:
    """What a node with texts of its own complains about when it is asked for its name."""
    InProcessGrid(app, 1, {})  # messages are of a run, and it makes one
    own: dict[str, Any] = {"partition-id": 0, "train": str(playground.data), "eval": str(playground.data)}
    context = Context(1, 2, own, RecordDict(), {**run.run_config()})
    return failure_of(app(Message(RecordDict({"config": ConfigRecord()}), 2, "query.hello"), context))


@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize(("changes", "options", "named"), ASKED, ids=[one[2] for one in ASKED])
def test_a_real_node_refuses_what_only_a_simulation_has(
    playground: Playground, app: str, changes: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    failure = _told(APPS[app], playground, _run(playground, changes, **options))
    assert isinstance(failure, RecipeError)
    assert str(failure).startswith(f"{named}: only a simulation has that")
    assert "tightbeam simulate" in str(failure)


def test_the_production_app_takes_part_in_no_simulation(playground: Playground) -> None:
    run = _run(playground, {}, simulated=True)
    assert str(_told(client_app.app, playground, run)).startswith("simulated: only a simulation")
    assert _told(simulated_client_app.app, playground, run) is None


@pytest.mark.parametrize("app", APPS)
def test_a_real_run_is_taken_by_both(playground: Playground, app: str) -> None:
    assert _told(APPS[app], playground, _run(playground, {})) is None


def test_it_is_refused_before_it_is_submitted(playground: Playground, tmp_path: Path) -> None:
    run = _run(playground, {"faults": {"dropout": 0.1}})
    with pytest.raises(RecipeError, match=r"faults\.dropout: only a simulation"):
        run_on_superlink(run, "127.0.0.1:9", tmp_path / "ca.crt")
    assert not run.folder.exists()


def test_only_a_simulation_rolls_dice(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(playground, {"faults": {"dropout": 1.0, "straggler": 1.0, "slowdown": 7}}, simulated=True)
    client = Client(run, run.profile({"partition-id": 0}), {"partition-id": 0})
    simulated = SimulatedSurroundings()
    assert (simulated.vanishes(client, 1), simulated.slowdown(client, 1)) == (True, 7)
    monkeypatch.setattr(random.Random, "random", lambda self: pytest.fail("a real node rolled dice"))
    real = RealSurroundings()
    assert (real.vanishes(client, 1), real.slowdown(client, 1)) == (False, 1.0)


def test_who_has_no_texts_is_dealt_some_and_who_has_keeps_them(playground: Playground) -> None:
    run = _run(playground, {}, simulated=True)
    profile, data = run.profile({"partition-id": 0}), str(playground.data)
    dealt = Client(run, profile, {"partition-id": 0})
    own = Client(run, profile, {"partition-id": 0, "train": data, "eval": data})
    for path in SimulatedSurroundings().texts(dealt):
        assert path.is_relative_to(run.folder / "clients" / profile.name)
        assert path.is_file()
    for surroundings in (SimulatedSurroundings(), RealSurroundings()):
        assert surroundings.texts(own) == (playground.data, playground.data)
