"""What must not grow with the clients: memory for messages, looks at the ledger, waits for a cloud."""

import gc
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from support.commands import Cloud
from support.federations import Playground, figures
from tightbeam.common.errors import CloudUnavailableError
from tightbeam.edge.link import connection
from tightbeam.edge.link.carrier import RetryPolicy
from tightbeam.federation.client import participant
from tightbeam.federation.contract.layers import layers_of
from tightbeam.federation.contract.records import to_record
from tightbeam.federation.runtimes.grid import InProcessGrid
from tightbeam.federation.scenario import scenario_from_mapping
from tightbeam.federation.server.exchange import exchange
from tightbeam.federation.server.global_adapter import GlobalAdapter
from tightbeam.federation.server.journal import Journal
from tightbeam.federation.server.replies import Node
from tightbeam.federation.server.strategy import FederatedLora
from tightbeam.simulations.client_app import app

SHAPES = {"m.layers.5.q.lora_A.weight": (2, 60), "m.layers.5.q.lora_B.weight": (50, 2)}


class Lives:
    """A client app that counts how many records of arrays are alive when it is asked."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, message: Message, context: Context) -> Message:
        gc.collect()
        self.most = max(self.most, sum(type(one) is ArrayRecord for one in gc.get_objects()))
        notes = ConfigRecord({"client": "x", "status": "failed", "reason": "it only looks"})
        return Message(RecordDict({"notes": notes, "metrics": figures(message)}), reply_to=message)


def _alive(folder: Path, clients: int) -> int:
    """The most records alive while so many clients are asked for a round's work."""
    scenario = scenario_from_mapping({"clients": clients, "rounds": 1, "client": {"r": 2}})
    layers, lives = layers_of(SHAPES, "test"), Lives()
    grid = InProcessGrid(lives, clients, {})
    ids = zip(grid.get_node_ids(), scenario.profiles(), strict=True)
    nodes = [Node(node_id, profile, b"", layers, frozenset()) for node_id, profile in ids]
    strategy = FederatedLora(scenario, nodes, Journal(folder, scenario))
    arrays = to_record(GlobalAdapter.initial([layers], 2, 0).arrays())
    gc.collect()
    gc.freeze()  # what is there already is neither counted nor looked through again
    assert len(exchange(grid, strategy.configure_train(1, arrays, ConfigRecord(), grid))) == clients
    gc.unfreeze()
    return lives.most


def test_messages_are_made_one_at_a_time(tmp_path: Path) -> None:
    few, many = _alive(tmp_path / "few", 3), _alive(tmp_path / "many", 12)
    assert many == few
    assert few > 0


def test_a_clients_rows_are_found_without_reading_the_others(tmp_path: Path) -> None:
    scenario = scenario_from_mapping({"clients": 2, "rounds": 1})
    journal = Journal(tmp_path, scenario)
    for client in ("client-00", *["client-01"] * 3):
        journal.append("client_round", round=1, client=client, status="ok", wire_up_bytes=10**6)
    journal.rows = None  # type: ignore[assignment]  # whoever looks through all rows ends here
    assert [len(journal.of_client(name)) for name in ("client-00", "client-01", "client-02")] == [1, 3, 0]
    assert journal.spent("client-01").mb == pytest.approx(3)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges that give up on a cloud after a second."""

    def soon(*where: Any, **options: Any) -> Any:
        policy = RetryPolicy(give_up_after_s=1.0)
        return connection.connect(*where, **options | {"policy": policy, "wait_s": 1.0})

    monkeypatch.setattr(participant, "connect", soon)
    monkeypatch.setattr(participant, "_AWAY_S", {})


def test_a_cloud_that_dies_ends_the_run_once_for_all(
    backbone: Path, tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed while the second of five clients works: it waits for the cloud, and nobody after it does."""
    with Cloud(backbone, tmp_path / "cloud") as cloud:
        playground = Playground(cloud.address, tmp_path, backbone)
        scenario = playground.scenario(clients=5, rounds=2, eval_every=1)

        def client(message: Message, context: Context) -> Message:
            config = message.content.config_records.get("config") or ConfigRecord()
            asked = (
                message.metadata.message_type,
                config.get("server-round"),
                context.node_config["partition-id"],
            )
            if asked == ("train", 2, 1):
                cloud.kill()
            return app(message, context)

        with pytest.raises(CloudUnavailableError, match=r"away for 4 of 5 clients in round 2") as caught:
            playground.run_with(scenario, client)
        assert caught.value.exit_code == 6
        assert "go on with --resume" in str(caught.value)
        reasons = [row["reason"] for row in playground.rows(scenario, "client_round") if row["round"] == 2]
        assert sum("a moment ago" in reason for reason in reasons) == 3
        assert [row["round"] for row in playground.rows(scenario, "round")] == [1], "not taken for a round"
        cloud.start()
        participant._AWAY_S.clear()
        playground.run(scenario, resume=True)
    assert [row["updates"] for row in playground.rows(scenario, "round")] == [5, 5]


def test_evaluations_ask_the_same_sample_each_time(playground: Playground) -> None:
    scenario = playground.scenario(clients=4, rounds=2, sample=2, eval_every=1)
    playground.run(scenario)
    rows = playground.rows(scenario, "client_eval")
    asked = [{row["client"] for row in rows if row["round"] == number} for number in range(3)]
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) == 2


def test_adapters_of_their_own_are_asked_of_all_at_the_end(playground: Playground) -> None:
    scenario = playground.scenario(clients=3, rounds=1, sample=1, client={"share": "top"})
    playground.run(scenario)
    rows = playground.rows(scenario, "client_eval")
    assert [sum(row["round"] == number for row in rows) for number in (0, 1)] == [1, 3]
    assert all((scenario.folder / "clients" / p.name / "adapter").exists() for p in scenario.profiles())
