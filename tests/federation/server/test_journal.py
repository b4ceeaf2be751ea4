"""The server's ledger and states: what is complete counts, what was cut off is done again."""

from pathlib import Path

import numpy as np
import pytest

from tightbeam.common.accounts.prices import Prices
from tightbeam.common.errors import RecipeError
from tightbeam.edge.report.meter import read_ledger
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.federation.server.journal import Journal, Row, State, moved_bytes, slow_clients

SCENARIO = scenario_from_mapping({"clients": 2, "rounds": 3})


def _begun(folder: Path, scenario: Scenario = SCENARIO) -> Journal:
    journal = Journal(folder, scenario)
    journal.begin(resume=False)
    journal.append("experiment", scenario=scenario.numbers())
    return journal


def _state(number: int) -> State:
    return State(number, {"global/a": np.full((2, 3), number / 3)})


def test_a_resumed_ledger_has_complete_rounds_and_what_was_spent_beyond(tmp_path: Path) -> None:
    journal = _begun(tmp_path)
    for number in (1, 2):
        journal.append("client_round", round=number, client="client-00", status="ok")
        journal.append("round", round=number)
        journal.save(_state(number))
    journal.append("client_round", round=3, client="client-00", status="ok")  # and then it was killed
    heard: list[Row] = []
    again = Journal(tmp_path, SCENARIO, heard.append)
    state = again.begin(resume=True)
    assert state is not None
    assert state.round == 2
    assert np.array_equal(state.arrays["global/a"], np.full((2, 3), 2 / 3))
    kinds = ["experiment", *["client_round", "round"] * 2, "client_round"]
    assert [row["row"] for row in again.rows] == kinds
    assert again.rows[-1]["status"] == "cut off"
    assert heard == again.rows == read_ledger(tmp_path / "ledger.jsonl")


def test_a_state_without_its_mark_is_not_complete(tmp_path: Path) -> None:
    journal = _begun(tmp_path)
    for number in (0, 1):
        journal.save(_state(number))
    (tmp_path / "state" / "round-1.json").unlink()  # killed between the two files
    state = Journal(tmp_path, SCENARIO).begin(resume=True)
    assert state is not None
    assert state.round == 0


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    journal = _begun(tmp_path)
    journal.save(_state(0))
    with (tmp_path / "ledger.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"row":"client_ro')
    again = Journal(tmp_path, SCENARIO)
    again.begin(resume=True)
    again.append("round", round=1)
    assert [row["row"] for row in read_ledger(tmp_path / "ledger.jsonl")] == ["experiment", "round"]


def test_killed_before_the_first_state_it_starts_anew(tmp_path: Path) -> None:
    _begun(tmp_path).append("client_eval", round=0, client="client-00", status="ok")
    again = Journal(tmp_path, SCENARIO)
    assert again.begin(resume=True) is None
    assert [row["row"] for row in again.rows] == ["experiment", "client_eval"]
    assert again.rows[1]["status"] == "cut off"


def test_old_states_make_room(tmp_path: Path) -> None:
    journal = _begun(tmp_path)
    for number in range(5):
        journal.save(_state(number))
    names = {path.name for path in (tmp_path / "state").iterdir()}
    assert names == {f"round-{n}.{ending}" for n in (3, 4) for ending in ("json", "safetensors")}


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("backbone", "other"), ("clients", 3)])
def test_another_experiment_is_not_resumed(tmp_path: Path, key: str, value: int) -> None:
    _begun(tmp_path)
    other = SCENARIO.model_copy(update={key: value})
    with pytest.raises(RecipeError, match=f"started with another {key}"):
        Journal(tmp_path, other).begin(resume=True)


def test_spending_is_the_sum_of_a_clients_rows(tmp_path: Path) -> None:
    journal = _begun(tmp_path)
    row = {
        "wire_up_bytes": 1_000_000, "wire_down_bytes": 2_000_000, "weight_bytes": 3_000_000,
        "adapter_up_bytes": 400_000, "adapter_down_bytes": 500_000, "joules": 20.0, "cloud_flops": 10**12,
    }  # fmt: skip
    assert moved_bytes(row) == 6_900_000
    journal.append("client_round", round=1, client="client-00", status="ok", **row)
    journal.append("client_eval", round=1, client="client-00", status="ok", **row)
    journal.append("client_round", round=1, client="client-01", status="ok", **row)
    spent = journal.spent("client-00")
    assert spent.mb == pytest.approx(13.8)
    assert spent.joules == 40.0
    bill = Prices().bill(wire_bytes=13_800_000, cloud_flops=2 * 10**12, edge_joules=40.0)
    assert spent.money == pytest.approx(bill.total)
    assert journal.spent("client-07").mb == 0


def test_groups_in_another_order_are_another_experiment(tmp_path: Path) -> None:
    groups = {"phones": {"clients": 1, "cut": "2:2"}, "boxes": {"clients": 1, "cut": "1:1"}}
    one, other = (
        scenario_from_mapping(
            {"clients": 2, "rounds": 3, "groups": dict(sorted(groups.items(), reverse=turned))}
        )
        for turned in (False, True)
    )
    assert [p.options.cut for p in one.profiles()] != [p.options.cut for p in other.profiles()]
    _begun(tmp_path, one).save(_state(0))
    assert Journal(tmp_path, one).begin(resume=True) is not None
    with pytest.raises(RecipeError, match="was started with another groups"):
        Journal(tmp_path, other).begin(resume=True)


def test_slow_is_over_one_and_a_half_times_the_median() -> None:
    assert slow_clients({}) == {}
    assert slow_clients({"a": 1.0, "b": 1.5, "c": 1.0}) == {}
    assert slow_clients({"a": 1.0, "b": 1.6, "c": 1.0, "d": 4.0, "e": 1.0}) == {"b": 1.6, "d": 4.0}
