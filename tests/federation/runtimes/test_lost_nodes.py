"""Nodes that vanish or stand still on a deployment: what Flower's SuperLink answers for them ends nothing."""

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message

from support.federations import Playground, Signed
from tightbeam.common.errors import CohortError, FederationError
from tightbeam.federation.runtimes.grid import InProcessGrid
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.exchange import exchange

LOST = "Its node is lost: the SuperLink has not heard from it."


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make nodes answer no message of these types any more, from their n-th one on."""
    answered = InProcessGrid.push_messages

    def lose(partitions: set[int], kinds: set[str], start: int = 0, *, silent: bool = False) -> None:
        seen = dict.fromkeys(partitions, 0)

        def is_lost(message: Message) -> bool:
            partition = message.metadata.dst_node_id - 2
            if partition not in partitions or message.metadata.message_type not in kinds:
                return False
            seen[partition] += 1
            return seen[partition] > start

        def push_messages(self: InProcessGrid, messages: Iterable[Message]) -> Iterable[str]:
            (message,) = messages
            if not is_lost(message):
                return answered(self, [message])
            name = f"lost-{id(message)}-{sum(seen.values())}"
            message.metadata.__dict__["_message_id"] = name
            if not silent:
                told = create_message_error_unavailable_res_message(message.metadata, "node_unavail")
                assert told.metadata.src_node_id == 1, "that of the SuperLink"
                self._replies[name] = told
            return [name]

        monkeypatch.setattr(InProcessGrid, "push_messages", push_messages)
        if silent:
            monkeypatch.setattr("tightbeam.federation.server.exchange.ANSWER_S", 0.0)

    return lose


def _failures(playground: Playground, scenario: Scenario, kind: str) -> list[tuple[str, int, str]]:
    rows = [row for row in playground.rows(scenario, kind) if row["status"] == "failed"]
    return [(row["client"], row["round"], row["reason"]) for row in rows]


def test_a_lost_node_is_named_and_the_others_go_on(playground: Playground, lose: Any) -> None:
    lose({1}, {"train", "evaluate"}, start=1)  # it is there for the first evaluation only
    scenario = playground.scenario(eval_every=1)
    printed = playground.run(scenario)
    lost = [("client-01", number, LOST) for number in (1, 2)]
    assert _failures(playground, scenario, "client_round") == lost
    assert _failures(playground, scenario, "client_eval") == lost
    assert [row["updates"] for row in playground.rows(scenario, "round")] == [2, 2]
    assert [row["clients"] for row in playground.rows(scenario, "evaluation")] == [3, 2, 2]
    assert f"round 1: client-01 failed: {LOST}" in printed
    assert LOST in (scenario.folder / "report.html").read_text(encoding="utf-8")


def test_a_node_that_stands_still_is_named_as_well(playground: Playground, lose: Any) -> None:
    lose({2}, {"train"}, silent=True)
    scenario = playground.scenario(rounds=1)
    playground.run(scenario)
    told = [("client-02", 1, "No answer within 0 s.")]
    assert _failures(playground, scenario, "client_round") == told


def test_with_all_nodes_lost_the_run_does_not_look_complete(playground: Playground, lose: Any) -> None:
    lose({0, 1, 2}, {"train"})
    with pytest.raises(CohortError, match=rf"client-00 says: {LOST}"):
        playground.run(playground.scenario())


def test_a_node_lost_just_before_the_start_is_left_out_by_its_clients_name(
    playground: Playground, lose: Any
) -> None:
    lose({1}, {"query.hello"})
    scenario = playground.scenario(rounds=1)
    printed = playground.run(scenario)
    assert f"round 0: client-01 cannot join: {LOST}" in printed
    assert playground.rows(scenario, "round")[0]["updates"] == 2


def test_the_one_that_is_asked_what_all_share_may_be_lost_as_well(playground: Playground, lose: Any) -> None:
    lose({0}, {"query.layers"})
    scenario = playground.scenario(rounds=1)
    printed = playground.run(scenario)
    assert f"round 0: client-00 cannot join: {LOST}" in printed
    assert "round 1: client-00 has joined" in printed, "it answers again"
    assert [row["clients"] for row in playground.rows(scenario, "evaluation")] == [2, 3]


def test_a_lost_node_does_not_count_among_those_to_wait_for(
    playground: Playground, lose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose({1}, {"query.hello"})
    monkeypatch.setattr("tightbeam.federation.server.roster._NODES_S", 0.0)
    with pytest.raises(FederationError, match=r"2 of 3 clients are there"):
        playground.run(playground.scenario(wait_for=3))


@pytest.mark.parametrize("start", [1, 2], ids=["share", "consent"])
def test_a_secure_sum_gets_over_a_node_that_is_lost_between_exchanges(
    signed: Signed, lose: Any, start: int
) -> None:
    """The first evaluation has four exchanges of its own, and all are there for it."""
    lose({1}, {"query.secure"}, start=4 + start)
    scenario = signed.run(rounds=1)
    masked = signed.scenario(rounds=1, strategy={"secure": True})
    signed.playground.run(masked)
    (row,), (here,) = (signed.playground.rows(one, "round") for one in (masked, scenario))
    assert row["updates"] == (3 if start < 2 else 4), "whose vector has come is in the sum"
    assert (row["loss"] == pytest.approx(here["loss"], rel=1e-4)) == (start >= 2)


def test_answers_come_in_the_order_of_the_messages(lose: Any) -> None:
    """And from the node that was asked, whoever spoke for it."""
    lose({0, 2}, {"query.hello"})
    grid = InProcessGrid(lambda message, context: Message(message.content, reply_to=message), 4, {})
    asked = [Message(RecordDict(), node, "query.hello") for node in (5, 4, 3, 2)]
    replies = exchange(grid, asked)
    assert [reply.metadata.src_node_id for reply in replies] == [5, 4, 3, 2]
    assert [reply.has_error() for reply in replies] == [False, True, False, True]
