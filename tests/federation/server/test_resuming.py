"""What a resumed experiment may change, and that it counts all that was spent before it was cut off."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message

from support.federations import Playground, Signed, spoiled
from tightbeam.common.errors import FederationError, RecipeError
from tightbeam.edge.report.meter import read_ledger
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.federation.server.resuming import MAY_CHANGE, changes
from tightbeam.simulations.client_app import app

DOCS = Path(__file__).parents[3] / "docs" / "federation.md"


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def _killed_in(number: int, kind: str, partition: int) -> Any:
    """The real client app, whose process dies when this client has done its work in this round."""

    def call(message: Message, context: Context) -> Message:
        reply = app(message, context)
        config = message.content.config_records.get("config") or ConfigRecord()
        asked = message.metadata.message_type, config.get("server-round"), context.node_config["partition-id"]
        if asked == (kind, number, partition):
            raise Killed
        return reply

    return call


def _edge_bytes(scenario: Scenario) -> int:
    """What the edges' own ledgers say of their steps."""
    rows = [
        row
        for profile in scenario.profiles()
        for row in read_ledger(scenario.folder / "clients" / profile.name / "ledger.jsonl")
    ]
    return sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in rows if row["row"] == "step")


def _report_bytes(report: dict[str, Any]) -> int:
    total = report["total"]
    return int(total["activation_up_bytes"] + total["activation_down_bytes"])


@pytest.mark.parametrize(
    ("number", "kind", "partition"),
    [(2, "train", 1), (2, "evaluate", 0), (1, "train", 0), (0, "evaluate", 2)],
    ids=["in a round", "after a round", "in the first round", "before the first state"],
)
def test_after_a_resume_the_report_has_every_byte_of_the_edges_ledgers(
    playground: Playground, number: int, kind: str, partition: int
) -> None:
    scenario = playground.scenario()
    with pytest.raises(Killed):
        playground.run_with(scenario, _killed_in(number, kind, partition))
    before = _edge_bytes(scenario)
    assert before > 0
    playground.run(scenario, resume=True)
    report = playground.report(scenario)
    assert _report_bytes(report) == _edge_bytes(scenario) > before
    assert report["rounds"][1]["updates"] == 3
    whole = playground.scenario()
    playground.run(whole)
    assert _report_bytes(report) > _report_bytes(playground.report(whole))
    left, right = playground.state(whole), playground.state(scenario)
    assert all(np.array_equal(left[name], right[name]) for name in left), "and it learned the same"


@pytest.mark.parametrize("strategy", ["fedavgm", "ffa"])
def test_other_strategies_go_on_as_well(playground: Playground, strategy: str) -> None:
    """What a client tells of before is no record that Flower's own strategies would trip over."""
    scenario = playground.scenario(strategy={"name": strategy})
    with pytest.raises(Killed):
        playground.run_with(scenario, _killed_in(2, "train", 1))
    playground.run(scenario, resume=True)
    assert _report_bytes(playground.report(scenario)) == _edge_bytes(scenario)
    assert [row["updates"] for row in playground.rows(scenario, "round")] == [3, 3]


def test_a_secure_run_goes_on_and_counts_as_well(signed: Signed) -> None:
    scenario, playground = signed.scenario(strategy={"secure": True}), signed.playground
    with pytest.raises(Killed):
        playground.run_with(scenario, _killed_in(2, "train", 1))
    playground.run(scenario, resume=True)
    assert _report_bytes(playground.report(scenario)) == _edge_bytes(scenario)
    assert [row["updates"] for row in playground.rows(scenario, "round")] == [4, 4]


def test_a_budget_counts_what_was_cut_off(playground: Playground) -> None:
    """Enough for both rounds once; after the second one was cut off there is not enough for it again."""
    free = playground.scenario()
    playground.run(free)
    account = playground.report(free)["clients"][0]
    parts = [account[phase] for phase in ("training", "evaluation")]
    names = ("activation_up", "activation_down", "adapter_up", "adapter_down", "weight")
    mb = sum(part[f"{name}_bytes"] for part in parts for name in names) / 1e6 * 1.05
    group = {"metered": {"clients": 1, "budget": {"mb": mb}}}
    calm, cut_off = (playground.scenario(groups=group) for _ in "ab")
    playground.run(calm)
    assert {row["status"] for row in playground.rows(calm, "client_round")} == {"ok"}
    with pytest.raises(Killed):
        playground.run_with(cut_off, _killed_in(2, "train", 2))
    playground.run(cut_off, resume=True)
    last = [row for row in playground.rows(cut_off, "client_round") if row["client"] == "client-00"][-1]
    assert last["status"] == "left"
    assert "Its budget would be exceeded" in last["reason"]


def test_more_rounds_are_as_if_there_had_been_more_from_the_start(playground: Playground) -> None:
    long, short = playground.scenario(rounds=3), playground.scenario(rounds=1)
    playground.run(long)
    playground.run(short)
    more = short.model_copy(update={"rounds": 3})
    playground.run(more, resume=True)
    left, right = playground.state(long), playground.state(more)
    assert all(np.array_equal(left[name], right[name]) for name in left)
    assert playground.report(more)["changes"] == ["after round 1: rounds from 1 to 3"]
    page = (more.folder / "report.html").read_text(encoding="utf-8")
    assert "Changed on the way: after round 1: rounds from 1 to 3." in page
    playground.run(more, resume=True)  # and the changed one is what it is from now on
    with pytest.raises(RecipeError, match=r"rounds is 2, but 3 are done\. Set rounds to 3 or more"):
        playground.run(more.model_copy(update={"rounds": 2}), resume=True)


def test_a_lower_learning_rate_is_taken_as_advised(playground: Playground) -> None:
    train = {"lr": 1e30, "steps": 2, "max_grad_norm": 0, "optimizer": "sgd"}
    scenario = playground.scenario(rounds=1, train=train)
    with pytest.raises(FederationError, match=r"Lower train\.lr.* go on with --resume"):
        playground.run(scenario)
    lower = scenario.model_copy(update={"train": scenario.train.model_copy(update={"lr": 1e-3})})
    playground.run(lower, resume=True)
    assert playground.report(lower)["changes"] == ["after round 0: train.lr from 1e+30 to 0.001"]


def test_a_raised_budget_brings_back_who_had_left_as_advised(playground: Playground) -> None:
    scenario = playground.scenario(rounds=1, client={"budget": {"mb": 0.001}})
    with pytest.raises(FederationError, match=r"Every client has left|had an update") as caught:
        playground.run(scenario)
    assert "--resume" in str(caught.value)
    budget = scenario.client.budget.model_copy(update={"mb": 1000.0})
    client = scenario.client.model_copy(update={"budget": budget})
    more = scenario.model_copy(update={"client": client, "rounds": 2})
    playground.run(more, resume=True)
    assert [row["updates"] for row in playground.rows(more, "round")] == [0, 3]


def test_advice_of_a_refused_weight_is_taken(playground: Playground) -> None:
    scenario = playground.scenario(rounds=1, strategy={"max_weight": 5})
    with pytest.raises(FederationError, match=r"raise strategy\.max_weight"):
        playground.run(scenario)
    strategy = scenario.strategy.model_copy(update={"max_weight": 100})
    playground.run(scenario.model_copy(update={"strategy": strategy}), resume=True)
    assert playground.rows(scenario, "round")[0]["updates"] == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 5), ("clients", 4), ("train.steps", 3), ("client.r", 16), ("client.cut", "2:2"),
        ("strategy.name", "ffa"), ("adapter.scale", 1.0), ("data.max_length", 99), ("partition.by", "size"),
    ],
)  # fmt: skip
def test_all_else_is_another_experiment(key: str, value: object) -> None:
    base = {"clients": 3, "rounds": 2}
    old, new = (scenario_from_mapping(base, overrides=given).numbers() for given in ([], [f"{key}={value}"]))
    with pytest.raises(RecipeError, match=rf"started with another .*{key}.*What may change is rounds"):
        changes(Path("x"), old, new, 0)


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_the_page_has_what_may_change(key: str) -> None:
    text = DOCS.read_text(encoding="utf-8")
    (told,) = [part for part in text.split("\n\n") if part.startswith("A resume may change ")]
    assert f"`{key}`" in told


def test_a_start_that_came_to_nothing_does_not_block_the_next(playground: Playground) -> None:
    def nobody(client: int, reply: Message) -> None:
        notes = reply.content.config_records["notes"]
        notes["status"], notes["reason"] = "failed", "no disk"

    scenario = playground.scenario(rounds=1)
    with pytest.raises(Exception, match="no disk"):
        playground.run_with(scenario, spoiled(nobody))
    playground.run(scenario)
    assert playground.rows(scenario, "round")[0]["updates"] == 3
