"""Sums over run folders, and what is said about folders that cannot be summed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from support.fake_run import HIDDEN_SIZE, fake_run
from tightbeam.common.accounts.prices import Prices
from tightbeam.common.accounts.rows import StepBytes
from tightbeam.common.errors import CodecError, DataError
from tightbeam.common.wire.codecs import lossless
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.report.modes import TokenBytes, predict
from tightbeam.edge.report.schema import Costs
from tightbeam.edge.report.summary import summarise


def _rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_ledger(folder / "ledger.jsonl") if row["row"] == kind]


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    rows = [change(row) for row in read_ledger(folder / "ledger.jsonl")]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_run(tmp_path / "clinic", steps=24)


def test_bytes_and_operations_are_the_rows_sums(run: Path) -> None:
    costs, rows = summarise([run]), _rows(run, "step")
    (edge,) = costs.edges
    for kind in ("forward", "backward"):
        sealed = sum(row["sealed_up_bytes"] for row in rows if row["kind"] == kind)
        counted = edge.traffic[kind].sealed_up_bytes
        counted += edge.traffic["evaluation"].sealed_up_bytes if kind == "forward" else 0
        assert counted == sealed
    assert sum(edge.cloud_flops.values()) == sum(row["cloud_flops"] for row in rows)
    assert edge.edge_flops == sum(row["edge_flops"] for row in _rows(run, "optimizer_step"))
    weights = edge.traffic["weights"]
    assert weights == StepBytes(wire_up_bytes=4_000, wire_down_bytes=227_000_000)
    steps = sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in rows)
    assert costs.total.step_wire_bytes == steps
    assert costs.total.bytes.wire_total_bytes == steps + weights.wire_total_bytes


def test_a_forward_without_a_backward_is_an_evaluation(run: Path) -> None:
    (edge,) = summarise([run]).edges
    assert edge.step_counts == {"forward": 24, "backward": 24, "evaluation": 9}
    assert edge.training_tokens == sum(row["tokens"] for row in _rows(run, "optimizer_step"))
    assert edge.evaluation_tokens == sum(row["tokens"] for row in _rows(run, "eval"))


def test_every_second_of_training_is_in_one_phase(run: Path) -> None:
    seconds = summarise([run]).edges[0].seconds
    phases = seconds.model_dump(exclude={"wall", "evaluation"})
    assert sum(phases.values()) == pytest.approx(seconds.wall)
    assert seconds.other == pytest.approx(24 * 0.01)
    assert seconds.evaluation > 0


def test_predicted_bytes_are_measured_bytes(run: Path) -> None:
    prediction = summarise([run]).edges[0].prediction
    assert prediction is not None
    assert prediction.bytes_per_training_token == 4 * HIDDEN_SIZE * 4
    assert prediction.bytes_per_evaluation_token == 2 * HIDDEN_SIZE * 4
    assert prediction.predicted_payload_bytes == prediction.measured_payload_bytes


def test_the_prediction_notices_a_fifth_transfer(run: Path) -> None:
    """Negative control: twice the upload of every backward is not what the formula says."""

    def double(row: dict[str, Any]) -> dict[str, Any]:
        return (
            row | {"payload_up_bytes": 2 * row["payload_up_bytes"]} if row.get("kind") == "backward" else row
        )

    _rewrite(run, double)
    prediction = summarise([run]).edges[0].prediction
    assert prediction is not None
    assert prediction.measured_payload_bytes > 1.2 * prediction.predicted_payload_bytes


def test_without_the_hidden_size_nothing_is_predicted(tmp_path: Path) -> None:
    costs = summarise([fake_run(tmp_path / "old", steps=2, hidden_size=None)])
    assert costs.edges[0].prediction is None
    assert costs.modes == []


def test_token_bytes_by_codec() -> None:
    names = ("activations_up", "activations_down", "gradients_up", "gradients_down")
    row = TokenBytes.of(100, dict(zip(names, ("int8", "fp32", "bf16", "bf16"), strict=True)))
    assert (row.forward, row.training) == (104 + 400, 104 + 400 + 200 + 200)
    prediction = predict(row, training_tokens=10, evaluation_tokens=5, measured_payload_bytes=0)
    assert prediction.predicted_payload_bytes == 10 * 904 + 5 * 504
    with pytest.raises(CodecError, match="fp17"):
        TokenBytes.of(100, dict.fromkeys(names, "fp17"))


def test_taps_are_rows_of_their_own() -> None:
    names = ("activations_up", "activations_down", "gradients_up", "gradients_down")
    plain = TokenBytes.of(100, dict.fromkeys(names, "int8"))
    tapped = TokenBytes.of(100, dict.fromkeys(names, "int8"), num_taps=3, tap_size=7)
    assert tapped.forward == plain.forward + 3 * (4 + 7)
    assert TokenBytes.of(100, dict.fromkeys(names, "int8"), tap_size=7) == plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_is_the_codec_that_changes_nothing(tmp_path: Path, dtype: str) -> None:
    edge = summarise([fake_run(tmp_path / "a", steps=1, codec="auto", dtype=dtype)]).edges[0]
    assert set(edge.codecs.values()) == {lossless(getattr(torch, dtype))}


def test_other_modes_by_hand(run: Path) -> None:
    costs = summarise([run])
    (edge,), modes = costs.edges, {mode.mode: mode for mode in costs.modes}
    # Three epochs and three evaluations: each example crosses once, d up and d down in fp32.
    once = edge.training_tokens / 3 + edge.evaluation_tokens / 3
    assert modes["ushape"].payload_bytes == costs.total.step_payload_bytes
    assert modes["top"].payload_bytes == round(once * 2 * HIDDEN_SIZE * 4)
    assert modes["side"].payload_bytes == round(once * 2.5 * HIDDEN_SIZE * 4)
    assert modes["local"].payload_bytes == 0
    assert [mode.mode for mode in costs.modes if mode.measured] == ["ushape"]
    assert modes["top"].cloud_bill < modes["ushape"].cloud_bill


def test_steps_instead_of_epochs_take_examples_as_seen_once(tmp_path: Path) -> None:
    thrice, unknown = (
        summarise([fake_run(tmp_path / name, steps=6, epochs=epochs)])
        for name, epochs in (("a", 3), ("b", None))
    )
    (_, top_thrice, *_), (_, top_unknown, *_) = thrice.modes, unknown.modes
    more_tokens = unknown.total.training_tokens * 2 / 3
    assert top_unknown.payload_bytes - top_thrice.payload_bytes == round(more_tokens * 2 * HIDDEN_SIZE * 4)


def test_a_repeated_step_is_counted_once(run: Path) -> None:
    before = summarise([run])
    again = next(row for row in _rows(run, "step") if row["kind"] == "backward")
    with (run / "ledger.jsonl").open("a") as file:
        file.write(json.dumps(again | {"resent_bytes": 777, "attempts": 1}) + "\n")
    after = summarise([run])
    assert after.total.bytes == before.total.bytes
    assert after.total.cloud_flops == before.total.cloud_flops
    assert after.total.resent_bytes == before.total.resent_bytes + 777
    assert after.edges[0].retried_steps == before.edges[0].retried_steps + 1


def test_retried_steps_are_told(run: Path) -> None:
    first = _rows(run, "step")[0]["step"]
    _rewrite(run, lambda row: row | {"attempts": 3, "resent_bytes": 9} if row.get("step") == first else row)
    edge = summarise([run]).edges[0]
    assert (edge.retried_steps, edge.resent_bytes) == (1, 9)


def test_a_resumed_run_keeps_the_last_loss_of_a_step(run: Path) -> None:
    with (run / "ledger.jsonl").open("a") as file:
        file.write(json.dumps(_rows(run, "optimizer_step")[-1] | {"loss": 0.125}) + "\n")
    edge = summarise([run]).edges[0]
    assert edge.train_loss[-1] == (24, 0.125)
    assert edge.optimizer_steps == 24


def test_timeline_holds_every_wire_byte(run: Path) -> None:
    (edge,) = summarise([run]).edges
    held = sum(part.forward_up_bytes + part.backward_up_bytes for part in edge.timeline)
    assert held == sum(row["wire_up_bytes"] for row in _rows(run, "step"))
    assert len(edge.timeline) <= 60


def test_two_edges_add_up(tmp_path: Path) -> None:
    folders = [fake_run(tmp_path / name, steps=8, seed=seed) for seed, name in enumerate(("a", "b"))]
    both, single = summarise(folders), [summarise([folder]) for folder in folders]
    assert both.total.bytes == single[0].total.bytes + single[1].total.bytes
    assert both.total.edge_s == pytest.approx(sum(costs.total.edge_s for costs in single))
    assert both.total.wall_s == pytest.approx(max(costs.total.wall_s for costs in single))
    assert {part.seconds for edge in both.edges for part in edge.timeline} == {
        both.edges[0].timeline[0].seconds
    }


def test_equal_folder_names_get_their_parents(tmp_path: Path) -> None:
    folders = [fake_run(tmp_path / parent / "run", steps=2) for parent in ("north", "south")]
    assert [edge.name for edge in summarise(folders).edges] == ["north/run", "south/run"]


def test_prices_reach_the_bill(run: Path) -> None:
    free = Prices(per_gigabyte=0, per_petaflop=0, per_kilowatt_hour=0)
    assert summarise([run], free).total.bill.total == 0
    total = summarise([run], free.model_copy(update={"per_gigabyte": 2})).total
    assert total.bill.total == pytest.approx(total.bytes.wire_total_bytes / 1e9 * 2)


def test_json_round_trip_and_version(run: Path) -> None:
    costs = summarise([run])
    text = costs.to_json()
    assert json.loads(text)["schema"] == "tightbeam.costs/1"
    assert Costs.from_json(text) == costs
    with pytest.raises(ValidationError):
        Costs.from_json(text.replace("tightbeam.costs/1", "tightbeam.costs/2"))


def test_env_may_be_missing(run: Path) -> None:
    (run / "env.json").unlink()
    assert summarise([run]).edges[0].device == "unknown"


def _no_steps(folder: Path) -> None:
    _rewrite(folder, lambda row: None if row["row"] in ("step", "optimizer_step") else row)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "ledger.jsonl").unlink(), r"Cannot read the ledger .*`tightbeam train`"),
        (lambda folder: (folder / "config.yaml").unlink(), r"config\.yaml.*`tightbeam train`"),
        (lambda folder: (folder / "config.yaml").write_text("- 1"), r"config\.yaml is not a recipe"),
        (lambda folder: (folder / "env.json").write_text("{"), r"Cannot read .*env\.json"),
        (_no_steps, r"no step in it yet.* Let the run train"),
        (lambda folder: _rewrite(folder, lambda row: row | {"row": "surprise"}), r"jsonl:1 .*surprise"),
        (lambda folder: _rewrite(folder, lambda row: row | {"tokens": "many"}), r"jsonl:\d+ is not a row"),
    ],
    ids=["no ledger", "no config", "config", "env", "no steps", "unknown row", "wrong type"],
)
def test_what_cannot_be_summed_is_named(run: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(run)
    with pytest.raises(DataError, match=message):
        summarise([run])


def test_folders_must_exist_once(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder"):
        summarise([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="twice"):
        summarise([run, run])
    with pytest.raises(DataError, match=re.escape(f"Give the ones in it: {run}.")):
        summarise([run.parent])
    with pytest.raises(DataError, match="No run folder was given"):
        summarise([])
