"""What goes wrong in a round is named, kept out of the adapter, and never looks like success."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message

from support.federations import Playground, spoiled
from tightbeam.common.errors import (
    CloudUnavailableError,
    CohortError,
    DataError,
    FederationError,
    RecipeError,
    UsageError,
)
from tightbeam.federation.accounts.report import write_report
from tightbeam.federation.runtimes.grid import InProcessGrid
from tightbeam.federation.scenario import Scenario


def _spoil_arrays(number: int, change: Any) -> Any:
    """Change one tensor of one client's update."""

    def spoil(client: int, reply: Message) -> None:
        if client == number and reply.has_content() and "arrays" in reply.content.array_records:
            record = reply.content.array_records["arrays"]
            name = next(iter(record))
            record[name] = Array(change(record[name].numpy().copy()))

    return spoiled(spoil)


def _statuses(playground: Playground, scenario: Scenario) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in playground.rows(scenario, "client_round"):
        found.setdefault(row["client"], set()).add(row["status"])
    return found


def _nan(array: np.ndarray) -> np.ndarray:
    array[0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_nan, "NaN or infinite"),
        (lambda array: array[:, 1:], "is for shape"),
        (lambda array: array[1:], "fit"),
    ],
    ids=["nan", "other-layer-shape", "other-rank"],
)
@pytest.mark.parametrize("strategy", ["fedit", "fedavgm"])
def test_a_wrong_update_is_refused_and_named(
    playground: Playground, change: Any, said: str, strategy: str
) -> None:
    scenario = playground.scenario(rounds=1, strategy={"name": strategy})
    printed = playground.run_with(scenario, _spoil_arrays(1, change))
    row = next(row for row in playground.rows(scenario, "client_round") if row["client"] == "client-01")
    assert row["status"] == "refused"
    assert "client-01" in row["reason"]
    assert ".layers.0." in row["reason"]
    assert said in row["reason"]
    assert row["reason"] in printed
    assert playground.rows(scenario, "round")[0]["updates"] == 2
    assert all(np.isfinite(array).all() for array in playground.state(scenario).values())


def test_without_the_wrong_client_the_round_is_as_if_it_had_not_been_sampled(playground: Playground) -> None:
    """What remains of a refused update is its account, not a trace in the adapter."""
    spoilt, honest = (playground.scenario(rounds=1) for _ in range(2))
    playground.run_with(spoilt, _spoil_arrays(2, _nan))
    playground.run_with(honest, spoiled(lambda client, reply: None))
    left, right = playground.state(spoilt), playground.state(honest)
    assert any(not np.array_equal(left[name], right[name]) for name in left)  # the third client counts there
    assert playground.rows(spoilt, "client_round")[2]["wire_up_bytes"] > 0


def test_a_client_that_fails_says_why_and_the_others_go_on(playground: Playground) -> None:
    later = playground.scenario(rounds=1)

    def lose_its_texts(client: int, reply: Message) -> None:
        (later.folder / "clients" / "client-01" / "train.jsonl").unlink(missing_ok=True)

    printed = playground.run_with(later, spoiled(lose_its_texts))
    write_report(later.folder, later)
    row = next(row for row in playground.rows(later, "client_round") if row["client"] == "client-01")
    assert row["status"] == "failed"
    assert "train.jsonl" in row["reason"]
    assert row["reason"] in printed
    assert row["reason"] in (later.folder / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert playground.rows(later, "round")[0]["updates"] == 2


def test_a_cut_that_the_cloud_refuses_is_told_before_the_first_round(playground: Playground) -> None:
    scenario = playground.scenario(groups={"broken": {"clients": 1, "cut": "5:5"}})
    with pytest.raises(UsageError, match=r"5:5"):
        playground.run(scenario)


def test_when_every_client_fails_the_run_does_not_look_complete(playground: Playground) -> None:
    scenario = playground.scenario(train={"lr": 1e30, "steps": 3, "max_grad_norm": 0, "optimizer": "sgd"})
    with pytest.raises(CohortError, match="client-00 says: The"):
        playground.run(scenario)
    assert not (scenario.folder / "adapter").exists()
    assert not (scenario.folder / "report.html").exists()


def test_dropouts_stragglers_and_a_deadline_are_drawn_by_the_seed(playground: Playground) -> None:
    faults = {"dropout": 0.3, "straggler": 0.4, "slowdown": 1000, "deadline_s": 5}
    one, two = (
        playground.scenario(clients=6, rounds=3, faults=faults, client={"network": "4g"}) for _ in "ab"
    )
    playground.run(one)
    playground.run(two)
    seen = {status for statuses in _statuses(playground, one).values() for status in statuses}
    assert seen == {"ok", "dropped", "late"}
    assert _statuses(playground, one) == _statuses(playground, two)
    late = [row for row in playground.rows(one, "client_round") if row["status"] == "late"]
    assert all(row["virtual_s"] > 5 for row in late)
    assert all(row["virtual_s"] <= 5 for row in playground.rows(one, "round"))


def test_without_an_update_in_any_round_the_run_fails_and_can_go_on_as_it_says(
    playground: Playground,
) -> None:
    scenario = playground.scenario(rounds=1, faults={"dropout": 1.0})
    with pytest.raises(FederationError, match=r"None of 1 rounds had an update: .*faults\.dropout") as caught:
        playground.run(scenario)
    assert caught.value.exit_code == 7
    assert not (scenario.folder / "adapter").exists()
    before, after = playground.state(scenario, 0), playground.state(scenario, 1)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    (row,) = playground.rows(scenario, "round")
    assert (row["updates"], row["loss"], row["notes"]) == (0, None, ["no update"])
    faults = scenario.faults.model_copy(update={"dropout": 0.0})
    playground.run(scenario.model_copy(update={"rounds": 2, "faults": faults}), resume=True)
    assert (scenario.folder / "adapter").exists()


def test_a_budget_degrades_the_codec_and_then_the_client_leaves(playground: Playground) -> None:
    free = playground.scenario(rounds=1, eval_every=0)
    playground.run(free)
    rows = [r for r in playground.rows(free, "client_round") if r["client"] == "client-00"]
    fixed = playground.report(free)["clients"][0]
    once_mb = (rows[0]["wire_up_bytes"] + rows[0]["wire_down_bytes"]) / 1e6
    besides_mb = (fixed["training"]["weight_bytes"] + fixed["evaluation"]["weight_bytes"]) / 1e6
    besides_mb += sum(fixed["evaluation"][f"activation_{way}_bytes"] for way in ("up", "down")) / 2e6
    besides_mb += 7 * rows[0]["adapter_down_bytes"] / 1e6
    budget = {"mb": besides_mb + 1.4 * once_mb, "degrade": ["bf16", "int8"]}
    scenario = playground.scenario(rounds=6, groups={"metered": {"clients": 1, "budget": budget}})
    printed = playground.run(scenario)
    own = [row for row in playground.rows(scenario, "client_round") if row["client"] == "client-00"]
    codecs = [row["codec"] for row in own if row["status"] == "ok"]
    assert codecs[0] == "auto"
    assert codecs[-1] in ("bf16", "int8")
    assert own[-1]["status"] == "left"
    assert "Its budget would be exceeded" in own[-1]["reason"]
    assert "client-00 left" in printed
    assert len([row for row in own if row["status"] == "left"]) == 1, "who has left is not asked again"
    spent = playground.report(scenario)["clients"][0]
    moved = sum(
        spent[phase][f"{what}_{way}_bytes"]
        for phase in ("training", "evaluation")
        for what in ("activation", "adapter")
        for way in ("up", "down")
    )
    weights = spent["training"]["weight_bytes"] + spent["evaluation"]["weight_bytes"]
    assert (moved + weights) / 1e6 <= budget["mb"]


def test_a_device_that_is_too_small_leaves_and_without_anybody_the_run_ends(playground: Playground) -> None:
    device = {"gflops": 10, "memory_mb": 0.01}
    scenario = playground.scenario(client={"device": device})
    with pytest.raises(FederationError, match="Every client has left"):
        playground.run(scenario)
    assert "its device has 0.01 MB" in playground.rows(scenario, "client_round")[0]["reason"]


def _arriving(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The last client's node comes up only after so many looks."""
    looks = iter(range(10**6))
    everybody = InProcessGrid.get_node_ids

    def get_node_ids(self: InProcessGrid) -> list[int]:
        ids = list(everybody(self))
        return ids if next(looks) >= after else ids[:-1]

    monkeypatch.setattr(InProcessGrid, "get_node_ids", get_node_ids)


def test_a_client_joins_in_a_later_round(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cut of its own: layers that nobody had before begin afresh, the shared ones go on."""
    groups = {"there": {"clients": 2}, "late": {"clients": 1, "cut": "2:2"}}
    _arriving(monkeypatch, after=2)  # a look before round 1, one before each round
    scenario = playground.scenario(rounds=3, wait_for=2, groups=groups, train={"lr": 2e-2})
    printed = playground.run(scenario)
    rounds = [
        {row["client"] for row in playground.rows(scenario, "client_round") if row["round"] == number}
        for number in (1, 2, 3)
    ]
    assert rounds[0] == {"client-00", "client-01"}
    assert rounds[1] == rounds[2] == {"client-00", "client-01", "client-02"}
    assert "round 2: client-02 has joined" in printed
    blocks = {name.split(".layers.")[1].split(".")[0] for name in playground.state(scenario)}
    assert blocks == {"0", "1", "4", "5"}
    assert playground.report(scenario)["clients"][2]["rounds"] == 2


def test_a_newcomer_that_does_not_fit_is_named_and_the_others_go_on(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"there": {"clients": 2}, "late": {"clients": 1, "cut": "5:5"}}
    _arriving(monkeypatch, after=1)
    scenario = playground.scenario(rounds=2, wait_for=2, groups=groups)
    printed = playground.run(scenario)
    assert "round 1: client-02 cannot join: " in printed
    assert "5:5" in playground.rows(scenario, "joined")[0]["reason"]
    assert [row["updates"] for row in playground.rows(scenario, "round")] == [2, 2]


def test_without_waiting_for_fewer_the_server_waits_for_all(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    _arriving(monkeypatch, after=2)
    scenario = playground.scenario(rounds=1)
    playground.run(scenario)
    assert playground.rows(scenario, "round")[0]["updates"] == 3
    assert not playground.rows(scenario, "joined")


def test_an_unreachable_cloud_is_one_line_with_its_own_exit_code(playground: Playground) -> None:
    scenario = playground.scenario(cloud={"address": "127.0.0.1:9"})
    with pytest.raises(CloudUnavailableError) as caught:
        playground.run(scenario)
    assert caught.value.exit_code == 6


def test_an_impossible_partition_is_told_before_anything_starts(playground: Playground) -> None:
    scenario = playground.scenario(clients=60, cloud={"address": "127.0.0.1:9"})
    with pytest.raises(DataError, match="60 clients with at least 2 examples each need 120; the data has 72"):
        playground.run(scenario)


def test_a_folder_is_not_used_twice_and_not_resumed_with_other_numbers(playground: Playground) -> None:
    scenario = playground.scenario(rounds=1)
    playground.run(scenario)
    with pytest.raises(UsageError, match="already holds an experiment"):
        playground.run(scenario)
    other = scenario.model_copy(update={"seed": 5})
    with pytest.raises(RecipeError, match="started with another seed"):
        playground.run(other, resume=True)
    fresh = playground.scenario()
    with pytest.raises(UsageError, match="holds no experiment to resume"):
        playground.run(fresh, resume=True)
