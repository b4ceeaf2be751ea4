"""One node per client: a second one that says the same name gets nobody's place, and both are named."""

import re
from typing import Any

import pytest
from flwr.app import Context, Message

from support.federations import Playground
from tightbeam.common.errors import FederationError
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.runtimes.flower import Flower
from tightbeam.federation.runtimes.grid import InProcessGrid
from tightbeam.federation.server.claims import Claims
from tightbeam.simulations.client_app import app
from tightbeam.simulations.engines import run_deployed

IMPOSTOR, VICTIM = 4, 3  # nodes; the first is 2


def _as_client_01(message: Message, context: Context) -> Message:
    """The third node was started with the partition-id of the second."""
    if context.node_id == IMPOSTOR:
        context.node_config["partition-id"] = 1
    return app(message, context)


def test_two_nodes_of_one_partition_id_end_the_start_and_both_are_named(playground: Playground) -> None:
    said = (
        "Node 4 says that it is client-01, and so did Node 3 before it. Start each node with a partition-id"
    )
    with pytest.raises(FederationError, match=re.escape(said)):
        playground.run_with(playground.scenario(), _as_client_01)


def test_who_comes_later_takes_nobodys_place(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, everybody = iter(range(10**6)), InProcessGrid.get_node_ids
    trained: list[tuple[int, int]] = []

    def get_node_ids(self: InProcessGrid) -> list[int]:
        ids = list(everybody(self))
        return ids if next(looks) >= 2 else ids[:-1]

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            trained.append(
                (int(str(message.content.config_records["config"]["server-round"])), context.node_id)
            )
        return _as_client_01(message, context)

    monkeypatch.setattr(InProcessGrid, "get_node_ids", get_node_ids)
    scenario = playground.scenario(wait_for=2, rounds=3)
    printed = playground.run_with(scenario, call)
    assert trained == [(number, node) for number in (1, 2, 3) for node in (2, VICTIM)]
    (row,) = playground.rows(scenario, "joined")
    assert row["reason"].startswith("Node 4 says that it is client-01, and so did Node 3 before it.")
    assert row["reason"] in printed


def test_a_registered_name_is_kept_to_and_one_of_no_client_says_nothing() -> None:
    claims = Claims(["client-00", "client-01"])
    claims.note_registered({7: "client-01", 8: "the ward's machine", 9: ""})
    with pytest.raises(
        FederationError, match=r"Node 7 \(registered as client-01\) says that it is client-00"
    ):
        claims.bind(7, "client-00")
    claims.bind(7, "client-01")
    claims.bind(8, "client-00")
    claims.bind(8, "client-00")  # started again
    with pytest.raises(
        FederationError, match=r"Node 9 says .*, and so did Node 8 \(registered as the ward's"
    ):
        claims.bind(9, "client-00")


@pytest.mark.slow
def test_a_node_with_a_registered_key_is_the_client_that_the_key_was_registered_for(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = Flower.register

    def swapped(self: Flower, roster: Any) -> list[str]:
        one, other = roster / "client-00.pub", roster / "client-01.pub"
        keys = one.read_bytes(), other.read_bytes()
        one.write_bytes(keys[1])
        other.write_bytes(keys[0])
        return register(self, roster)

    monkeypatch.setattr(Flower, "register", swapped)
    scenario = playground.scenario(clients=2, rounds=1)
    with pytest.raises(FederationError, match=r"\(registered as client-0.\) says that it is client-0."):
        run_deployed(RunConfig(scenario, playground.address, None, scenario.folder))
