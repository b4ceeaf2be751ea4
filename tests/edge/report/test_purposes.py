"""What a forward was for decides how it is accounted, and a wait counts only where somebody waited."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.cached_runs import cached_recipe, save_model, train_over
from support.in_process import InProcessCloud
from tightbeam.cloud.projections import ProjectionOptions
from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.report.report import to_html
from tightbeam.edge.report.schema import Edge
from tightbeam.edge.report.summary import summarise

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
D = 64
TOKENS = 100
ROW_BYTES = 2 * D * 4


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCloud]:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    (folder / "public.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    fit = ProjectionOptions(file=folder / "p.safetensors", text=folder / "public.txt", size=4)
    with InProcessCloud(folder, tmp_path_factory.mktemp("cloud"), projection=fit) as running:
        yield running


def _step(number: int, purpose: str = "", **changes: Any) -> dict[str, Any]:
    half = TOKENS * ROW_BYTES // 2
    moved = StepBytes(
        payload_up_bytes=half, payload_down_bytes=half, wire_up_bytes=half, wire_down_bytes=half
    )
    row = StepRow(
        run="r", step=number, kind="forward", tokens=TOKENS, segments=4, bytes=moved, cloud_flops=1000,
        codec_s=0.01, seal_s=0.02, network_s=1.0, cloud_queue_s=0.4, cloud_compute_s=0.58,
    )  # fmt: skip
    return row.to_json() | {"purpose": purpose, "time_unix_s": float(number)} | changes


def _optimizer(n: int) -> dict[str, Any]:
    return {
        "row": "optimizer_step", "n": n, "loss": 2.0, "tokens": TOKENS, "wall_s": 1.0, "edge_compute_s": 0.79,
        "edge_flops": 7, "peak_memory_bytes": 5, "time_unix_s": 9.0,
    }  # fmt: skip


def _eval(n: int) -> dict[str, Any]:
    return {"row": "eval", "n": n, "loss": 2.5, "tokens": TOKENS, "time_unix_s": 9.0}


def _edge(folder: Path, mode: str, *rows: dict[str, Any]) -> Edge:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"epochs": 3}}))
    run = {
        "row": "run", "run": "r", "model": "m", "fingerprint": "0" * 64, "cut": "1:1", "codec": "fp32",
        "dtype": "float32", "mode": mode, "hidden_size": D,
    }  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in (run, *rows))
    (folder / "ledger.jsonl").write_text(lines)
    return summarise([folder]).edges[0]


def test_purposes_decide_the_kind(tmp_path: Path) -> None:
    edge = _edge(
        tmp_path / "a",
        "top",
        _step(1, "evaluate"),
        _eval(0),
        _step(2, "train"),
        _step(3, "fill"),
        _optimizer(1),
    )
    assert edge.step_counts == {"forward": 1, "backward": 0, "evaluation": 1, "fill": 1}
    assert (edge.training_tokens, edge.evaluation_tokens, edge.fill_tokens) == (TOKENS, TOKENS, TOKENS)
    assert edge.sequences == 12


def test_old_ledgers_read_as_before(tmp_path: Path) -> None:
    old = {key: value for key, value in _step(1).items() if key not in ("purpose", "waited_s")}
    edge = _edge(
        tmp_path / "a", "ushape", old, _eval(0), old | {"step": 2}, old | {"step": 2, "kind": "backward"}
    )
    assert edge.step_counts == {"forward": 1, "backward": 1, "evaluation": 1}


def test_a_fill_costs_the_seconds_that_were_waited_for_it(tmp_path: Path) -> None:
    edge = _edge(tmp_path / "a", "top", _step(1, "fill", waited_s=0.2), _optimizer(1))
    seconds = edge.seconds
    assert seconds.network == pytest.approx(0.1)  # half of the reply's two seconds, so half of the wait
    assert seconds.cloud_compute == pytest.approx(0.058)
    phases = seconds.model_dump(exclude={"wall", "evaluation"})
    assert sum(phases.values()) == pytest.approx(seconds.wall)


def test_a_step_that_was_waited_for_costs_all_its_seconds(tmp_path: Path) -> None:
    """Negative control: the same row without the word that others were computed meanwhile."""
    edge = _edge(tmp_path / "a", "top", _step(1, "fill"), _optimizer(1))
    assert edge.seconds.network == pytest.approx(1.0)
    assert sum(edge.seconds.model_dump(exclude={"wall", "evaluation"}).values()) > edge.seconds.wall


def test_fills_never_exceed_the_wall(tmp_path: Path) -> None:
    """A checkpoint waits for fills beside any optimizer step."""
    edge = _edge(tmp_path / "a", "top", _optimizer(1), _step(1, "fill", waited_s=1.9), _optimizer(2))
    phases = edge.seconds.model_dump(exclude={"wall", "evaluation"})
    assert sum(phases.values()) == pytest.approx(edge.seconds.wall) == pytest.approx(2.0)


def test_what_an_evaluation_waited_for_is_its_own(tmp_path: Path) -> None:
    edge = _edge(tmp_path / "a", "top", _step(1, "fill", waited_s=0.2), _eval(0), _optimizer(1))
    assert edge.seconds.evaluation == pytest.approx(0.01 + 0.2)
    assert edge.seconds.network == 0


def test_waited_shares() -> None:
    row = StepRow.from_json(_step(1, "fill", waited_s=9.0))
    assert row.waited_share == 1
    assert row.blocked_s == pytest.approx(2.01)
    assert StepRow.from_json(_step(1, "fill", waited_s=0.0)).blocked_s == pytest.approx(0.01)
    instant = _step(1, waited_s=0.1, seal_s=0.0, network_s=0.0, cloud_queue_s=0.0, cloud_compute_s=0.0)
    assert StepRow.from_json(instant).waited_share == 0


def test_a_run_in_top_is_predicted_and_compared(cloud: InProcessCloud, tmp_path: Path) -> None:
    recipe = cached_recipe(
        tmp_path, data={"eval_fraction": 0.2}, train={"steps": None, "epochs": 3.0, "checkpoint_every": 3}
    )
    result, crossing = train_over(cloud, recipe)
    assert {row.purpose for row in crossing.rows} == {"fill"}
    costs = summarise([result.folder.path])
    (edge,), modes = costs.edges, {mode.mode: mode for mode in costs.modes}
    rows = read_ledger(result.folder.ledger)
    trained = sum(row["tokens"] for row in rows if row["row"] == "optimizer_step")
    evaluated = sum(row["tokens"] for row in rows if row["row"] == "eval")
    assert (edge.trained_tokens, edge.evaluated_tokens) == (trained, evaluated)
    assert edge.fill_tokens == pytest.approx(trained / 3 + evaluated / 2)
    assert edge.prediction is not None
    assert edge.prediction.predicted_payload_bytes == edge.prediction.measured_payload_bytes > 0
    width = edge.hidden_size or 0
    assert modes["ushape"].payload_bytes == trained * 4 * width * 4 + evaluated * 2 * width * 4
    assert 0 < edge.shared_tokens == edge.fill_tokens - edge.crossed_tokens
    assert modes["side"].payload_bytes == pytest.approx(2.5 * width * 4 * edge.crossed_tokens)
    assert modes["top"].measured
    assert not modes["ushape"].measured
    assert modes["ushape"].cloud_flops > 3 * modes["top"].cloud_flops
    assert sum(edge.seconds.model_dump(exclude={"wall", "evaluation"}).values()) == pytest.approx(
        edge.seconds.wall
    )
    assert '<th scope="row">fill</th>' in to_html(costs)


@pytest.mark.parametrize(("taps", "codec"), [(2, "fp32"), (2, "int4"), (0, "fp32")])
def test_a_run_in_side_is_predicted_with_its_taps(
    cloud: InProcessCloud, tmp_path: Path, taps: int, codec: str
) -> None:
    recipe = cached_recipe(
        tmp_path, mode="side", side={"taps": taps, "width": 16, "heads": 2}, codec=codec,
        data={"eval_fraction": 0.2}, train={"checkpoint_every": 0},
    )  # fmt: skip
    result, _ = train_over(cloud, recipe)
    costs = summarise([result.folder.path])
    (edge,), modes = costs.edges, {mode.mode: mode for mode in costs.modes}
    assert edge.prediction is not None
    assert edge.prediction.predicted_payload_bytes == edge.prediction.measured_payload_bytes > 0
    assert modes["side"].measured
    assert modes["side"].payload_bytes == edge.prediction.measured_payload_bytes
    assert (modes["top"].payload_bytes < modes["side"].payload_bytes) == (taps > 0)
    assert [mode for mode in modes if modes[mode].measured] == ["side"]
    row = json.loads(result.folder.ledger.read_text().splitlines()[0])
    assert (row["num_taps"], row["tap_size"]) == (taps, 4 if taps else 0)


def test_a_ledger_of_side_without_tap_sizes_is_not_predicted(tmp_path: Path) -> None:
    edge = _edge(tmp_path / "a", "side", _step(1, "fill"), _optimizer(1))
    assert edge.prediction is None


def test_without_a_cache_forwards_are_training_and_evaluation(cloud: InProcessCloud, tmp_path: Path) -> None:
    recipe = cached_recipe(
        tmp_path, data={"eval_fraction": 0.2}, train={"steps": 4, "epochs": None}, cache={"enabled": False}
    )
    result, crossing = train_over(cloud, recipe)
    assert {row.purpose for row in crossing.rows} == {"train", "evaluate"}
    (edge,) = summarise([result.folder.path]).edges
    assert edge.training_tokens == edge.trained_tokens
    assert edge.evaluation_tokens == edge.evaluated_tokens
    assert edge.prediction is not None
    assert edge.prediction.predicted_payload_bytes == edge.prediction.measured_payload_bytes


def test_a_freezing_run_is_compared_with_one_that_does_not(cloud: InProcessCloud, tmp_path: Path) -> None:
    recipe = cached_recipe(
        tmp_path, mode="ushape", train={"steps": 8, "epochs": None, "freeze_bottom_after": "3 steps"}
    )
    result, crossing = train_over(cloud, recipe)
    assert {row.purpose for row in crossing.rows} == {"train", "fill"}
    costs = summarise([result.folder.path])
    assert costs.edges[0].prediction is not None
    predicted = costs.edges[0].prediction
    assert predicted.predicted_payload_bytes == predicted.measured_payload_bytes
    assert [mode.mode for mode in costs.modes] == ["freeze", "ushape", "top", "side", "local"]
