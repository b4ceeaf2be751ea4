"""A client's words and figures are judged as its arrays are: it is refused alone, with the figure's name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from support.federations import Playground, figures, spoiled
from tightbeam.common.errors import FederationError
from tightbeam.federation.contract.records import from_record
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.federation.server.judging import figures_told, layers_told, said

SCENARIO = scenario_from_mapping({"clients": 3, "rounds": 1})


def _metrics(**values: float) -> Callable[[Message], None]:
    def spoil(reply: Message) -> None:
        reply.content.metric_records["metrics"].update(values)

    return spoil


def _without(name: str) -> Callable[[Message], None]:
    def spoil(reply: Message) -> None:
        del reply.content.metric_records["metrics"][name]

    return spoil


def _status(value: str) -> Callable[[Message], None]:
    def spoil(reply: Message) -> None:
        reply.content.config_records["notes"]["status"] = value

    return spoil


def _no_record(name: str) -> Callable[[Message], None]:
    def spoil(reply: Message) -> None:
        del reply.content[name]

    return spoil


def _garbage(reply: Message) -> None:
    record = reply.content.array_records["arrays"]
    name = next(iter(record))
    record[name] = Array(dtype="float32", shape=(4, 4), stype="numpy.ndarray", data=b"no array")


CASES: dict[str, tuple[Callable[[Message], None], str]] = {
    "NaN weight": (_metrics(weight=float("nan")), "weight is nan"),
    "huge weight": (_metrics(weight=1e300), "weight is 1e+300"),
    "another's weight": (_metrics(weight=10**6), "by strategy.weight it is"),
    "own word for its examples": (_metrics(weight=2**30, examples=2**30), "not 1 to 1048576"),
    "NaN loss": (_metrics(loss=float("nan")), "loss is nan"),
    "huge loss": (_metrics(loss=1e308), "loss is 1e+308"),
    "no loss": (_without("loss"), "loss is missing"),
    "no weight": (_without("weight"), "weight is missing"),
    "negative bytes": (_metrics(**{"wire-up-bytes": -1}), "wire-up-bytes is -1"),
    "half a byte": (_metrics(**{"wire-up-bytes": 0.5}), "wire-up-bytes is 0.5, not a whole number"),
    "more tokens than it saw": (_metrics(tokens=10**9), "do not fit 8 examples"),
    "a column of the ledger": (_metrics(round=7), "round is no figure"),
    "unknown status": (_status("splendid"), "has the status splendid"),
    "a status of ours": (_status("late"), "has the status late"),
    "no words": (_no_record("notes"), "has the status None"),
    "no figures": (_no_record("metrics"), "is missing"),
    "no arrays": (_no_record("arrays"), "has no arrays"),
    "arrays of another form": (_garbage, "has no arrays that can be read"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clients_nonsense_is_refused_alone(playground: Playground, case: str) -> None:
    change, why = CASES[case]

    def spoil(client: int, reply: Message) -> None:
        if client == 1 and "arrays" in reply.content.array_records:
            change(reply)

    scenario = playground.scenario(rounds=1, eval_every=0)
    printed = playground.run_with(scenario, spoiled(spoil))
    rows = playground.rows(scenario, "client_round")
    assert [row["status"] for row in rows] == ["ok", "refused", "ok"]
    assert why in rows[1]["reason"]
    assert f"client-01 refused: {rows[1]['reason']}" in printed
    assert playground.rows(scenario, "round")[0]["updates"] == 2


def test_an_evaluation_goes_on_without_the_one_that_lies(playground: Playground) -> None:
    def spoil(client: int, reply: Message) -> None:
        if client == 2 and "arrays" not in reply.content.array_records and "metrics" in reply.content:
            _metrics(weight=0)(reply)

    scenario = playground.scenario(rounds=1)
    playground.run_with(scenario, spoiled(spoil))
    assert [row["clients"] for row in playground.rows(scenario, "evaluation")] == [2, 2]
    assert "its weight is 0" in playground.rows(scenario, "client_eval")[2]["reason"]


def test_the_roster_caps_what_a_client_counts_by(playground: Playground) -> None:
    scenario = playground.scenario(rounds=1, strategy={"max_weight": 5})
    with pytest.raises(FederationError, match="its weight is 19, not 1 to 5"):
        playground.run(scenario)


def _told(scenario: Scenario, **changed: Any) -> dict[str, Any]:
    asked = Message(RecordDict(), 2, "train")
    content = RecordDict({"notes": ConfigRecord({"status": "ok"}), "metrics": figures(asked, **changed)})
    return figures_told(scenario, "client-00", Message(content, 2, "train"), trains=True)


@pytest.mark.parametrize("unit", ["examples", "tokens", "equal"])
def test_a_weight_is_what_the_scenario_says_it_counts(unit: str) -> None:
    scenario = scenario_from_mapping({"clients": 3, "rounds": 1, "strategy": {"weight": unit}})
    told = {"examples": 7, "tokens": 50, "learned-tokens": 40}
    weight = {"examples": 7, "tokens": 40, "equal": 1}[unit]
    assert _told(scenario, weight=weight, **told)["weight"] == weight
    with pytest.raises(FederationError, match="weight"):
        _told(scenario, weight=weight + 1, **told)


def test_words_are_one_line_that_a_terminal_can_bear() -> None:
    assert said("a\x1b[2J\nb\u202e") == "a?[2J b?"
    assert len(said("x" * 10**6)) == 600


@pytest.mark.parametrize(
    "layers", ["", "[]", '{"shapes": {"a": [1]}}', '{"shapes": {"a": ["x"]}, "below": []}']
)
def test_what_a_client_shares_is_judged(layers: str) -> None:
    reply = Message(
        RecordDict({"notes": ConfigRecord({"status": "ok", "layers": layers})}), 2, "query.layers"
    )
    with pytest.raises(FederationError, match="client-00 does not say what it shares"):
        layers_told("client-00", reply)


def test_room_is_not_made_for_what_a_header_claims(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((10, 10), np.float32))
    data = (tmp_path / "a.npy").read_bytes().replace(b"(10, 10)", b"(99999,)")
    record = ArrayRecord({"a": Array(dtype="float32", shape=(10, 10), stype="numpy.ndarray", data=data)})
    with pytest.raises(ValueError, match="not the bytes of an array"):
        from_record(record)


def test_a_failure_without_figures_is_no_lie() -> None:
    notes = ConfigRecord({"status": "failed", "reason": "no disk"})
    reply = Message(RecordDict({"notes": notes, "metrics": MetricRecord()}), 2, "train")
    assert figures_told(SCENARIO, "client-00", reply, trains=True) == {}
