"""Money from the operator's price list to the page: whose price, and for which part of a run."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from support.cached_runs import save_model
from support.edge_runs import quiet, tiny_recipe
from support.fake_run import fake_run
from support.in_process import InProcessCloud
from tightbeam.cli.app import app
from tightbeam.common.accounts.prices import ASSUMED, CLOUD, TABLE, Prices
from tightbeam.common.errors import DataError, IdentityError, ProtocolError, UsageError
from tightbeam.common.identity.identities import ephemeral_identity
from tightbeam.common.wire.handshake import verify_bundle
from tightbeam.edge import connect
from tightbeam.edge.link.offer import asked_by
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.report.report import to_html
from tightbeam.edge.report.schema import Costs
from tightbeam.edge.report.summary import summarise
from tightbeam.edge.training.run import run_recipe
from tightbeam.proto import backbone_pb2 as pb

LIST: dict[str, Any] = {"currency": "EUR", "per_gigabyte": 1000.0, "per_petaflop": 7.0}


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCloud]:
    base = tmp_path_factory.mktemp("cloud")
    save_model(base / "model")
    with InProcessCloud(base / "model", base / "data", prices=pb.Prices(**LIST)) as started:
        started.listen()
        yield started


def _recipe(folder: Path, cloud: InProcessCloud, **changes: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    train = {"steps": 4, "checkpoint_every": 2, "eval_every": 1}
    model = {"cloud": cloud.address, "insecure": True}
    data = {"eval_fraction": 0.2}
    return tiny_recipe(folder, model=model, cut="2:2", train=train, data=data, **changes)


@pytest.fixture(scope="module")
def folder(cloud: InProcessCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("edge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIGHTBEAM_CACHE", str(base / "weights"))
        yield run_recipe(_recipe(base, cloud), console=quiet()[0]).folder.path


def test_the_operators_prices_reach_every_figure(folder: Path) -> None:
    (run,) = (row for row in read_ledger(folder / "ledger.jsonl") if row["row"] == "run")
    assert run["prices"] == LIST
    costs = Costs.from_json((folder / "costs.json").read_bytes())
    assert {name: getattr(costs.prices, name) for name in LIST} == LIST
    assert {name: costs.price_sources[name] for name in LIST} == dict.fromkeys(LIST, CLOUD)
    assert costs.price_sources["per_kilowatt_hour"] == costs.price_sources["edge_watts"] == ASSUMED
    total = costs.total
    assert total.bill.traffic == pytest.approx(total.bytes.wire_total_bytes / 1e9 * 1000)
    assert total.bill.cloud_compute == pytest.approx(total.cloud_flops / 1e15 * 7)
    assert total.download.wire_bytes == costs.edges[0].traffic["weights"].wire_total_bytes > 0
    parts = total.training.money + total.evaluation.money + total.download.money
    assert total.bill.total == pytest.approx(parts + total.bill.edge_electricity)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "1000 EUR per GB" in page
    assert "the cloud&#39;s price list" in page
    assert "USD" not in page


def test_a_table_of_ones_own_goes_first_and_says_so(folder: Path) -> None:
    costs = summarise([folder], Prices(per_gigabyte=2.0))
    assert (costs.prices.currency, costs.prices.per_gigabyte, costs.prices.per_petaflop) == ("EUR", 2.0, 7.0)
    assert (costs.price_sources["per_gigabyte"], costs.price_sources["per_petaflop"]) == (TABLE, CLOUD)
    with pytest.raises(UsageError, match=r"table is in CHF, the cloud's per_gigabyte in EUR\. Give per_giga"):
        summarise([folder], Prices(currency="CHF", per_petaflop=1.0))
    assert summarise([folder], Prices(currency="CHF", per_gigabyte=1, per_petaflop=1)).total.bill.total > 0


def test_both_sides_bill_the_same(cloud: InProcessCloud, folder: Path) -> None:
    names = {row["run"] for row in read_ledger(folder / "ledger.jsonl") if row["row"] == "run"}
    with connect(cloud.address, insecure=True) as edge:
        (used,) = (run for run in edge.usage() if run.run in names)
    moved = used.bytes.wire_up_bytes + used.bytes.wire_down_bytes
    assert edge.prices is not None
    costs = summarise([folder])
    assert edge.prices.money(wire_bytes=moved) == pytest.approx(
        costs.total.bill.traffic - costs.total.download.money
    )


def test_usage_prints_the_bill_of_each_run(cloud: InProcessCloud) -> None:
    with connect(cloud.address, insecure=True, name="edge", run="priced") as edge:
        model = edge.load_model("2:2")
        model(input_ids=model.dummy_inputs["input_ids"])
        (used,) = (run for run in edge.usage() if run.run == "priced")
    done = CliRunner().invoke(app, ["usage", cloud.address, "--insecure"])
    (line,) = (json.loads(line) for line in done.output.splitlines() if '"priced"' in line)
    moved = used.bytes.wire_up_bytes + used.bytes.wire_down_bytes
    assert line["bill"]["traffic"] == pytest.approx(moved / 1e9 * 1000)
    assert line["bill"]["total"] == pytest.approx(moved / 1e9 * 1000 + used.flops / 1e15 * 7)
    assert {name: line["bill"][name] for name in LIST} == LIST
    assert line["bill"]["source"] == CLOUD


def test_prices_that_the_cloud_has_not_signed_are_refused(cloud: InProcessCloud) -> None:
    card = cloud.card
    card.prices.per_gigabyte = 1.0
    with pytest.raises(IdentityError, match="prices are not those"):
        asked_by(card)
    card = cloud.card
    card.ClearField("prices")
    with pytest.raises(IdentityError, match="prices are not those"):
        asked_by(card)
    handed = cloud.card
    handed.prices.per_gigabyte = handed.key_bundle.prices.per_gigabyte = 1.0
    identity = ephemeral_identity("edge")
    with pytest.raises(IdentityError, match="did not sign"):
        verify_bundle(handed.key_bundle, identity.trust)


def test_a_run_ends_where_the_cloud_asks_for_something_else(cloud: InProcessCloud) -> None:
    with connect(cloud.address, insecure=True) as edge:
        edge.card.key_bundle.prices.per_gigabyte = 1.0  # what it was when this edge connected
        with pytest.raises(UsageError, match=r"changed its prices.*--resume"):
            edge.open_steps("2:2")._carrier._open_channel()


@pytest.mark.parametrize(
    "wrong",
    [
        {"per_gigabyte": float("nan")},
        {"per_petaflop": -1.0},
        {"per_gigabyte": float("inf")},
        {"currency": ""},
        {"currency": "\x1b[2J"},
        {"currency": "E" * 200},
    ],
)
def test_a_list_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    prices = pb.Prices(**(LIST | wrong))
    with pytest.raises(ProtocolError, match=f"price list is wrong: {next(iter(wrong))} is "):
        asked_by(pb.Card(prices=prices, key_bundle=pb.KeyBundle(prices=prices)))


def test_without_a_list_prices_are_assumed_and_say_so(tmp_path: Path) -> None:
    assert asked_by(pb.Card()) is None
    costs = summarise([fake_run(tmp_path / "run", steps=2)])
    assert set(costs.price_sources.values()) == {ASSUMED}
    assert "assumed" in to_html(costs)


def test_each_start_is_billed_by_its_own_list(tmp_path: Path) -> None:
    first = fake_run(tmp_path / "a", steps=2, prices=LIST)
    second = fake_run(tmp_path / "b", steps=2, prices=LIST | {"per_gigabyte": 1.0})
    both = (first / "ledger.jsonl").read_text() + (second / "ledger.jsonl").read_text()
    resumed = fake_run(tmp_path / "c", steps=2)
    (resumed / "ledger.jsonl").write_text(both)
    alone = [summarise([folder]).total for folder in (first, second)]
    for together in (summarise([resumed]).total, summarise([first, second]).total):
        assert together.bill.traffic == pytest.approx(sum(total.bill.traffic for total in alone))


def test_money_of_two_currencies_is_not_added_up(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, steps=2, prices=LIST | {"currency": name}) for name in ("CHF", "EUR")]
    with pytest.raises(DataError, match=r"CHF and EUR.*--prices FILE"):
        summarise(runs)
    table = Prices(currency="USD", per_gigabyte=1, per_petaflop=1)
    assert summarise(runs, table).prices.currency == "USD"


def test_watts_are_those_of_the_kind_of_device(tmp_path: Path, folder: Path) -> None:
    costs = Costs.from_json((folder / "costs.json").read_bytes())
    (edge,) = costs.edges
    assert (edge.device, edge.cloud_device) == ("cpu", "cpu")
    assert edge.energy.cloud_joules == pytest.approx(65 * edge.cloud_compute_s)
    assert "65 W for the cloud (cpu), assumed" in to_html(costs)
    told = summarise([folder], Prices(cloud_watts=12.0))
    assert told.total.energy.cloud_joules == pytest.approx(12 * edge.cloud_compute_s)
    assert "12 W for the cloud (cpu), your price table" in to_html(told)
    device = summarise([fake_run(tmp_path / "gpu", steps=2, cloud_device="cuda")])
    assert "700 W for the cloud (cuda), assumed" in to_html(device)


def test_training_is_compared_with_training(folder: Path) -> None:
    total = summarise([folder]).total
    steps = [row for row in read_ledger(folder / "ledger.jsonl") if row["row"] == "step"]
    for scope, purpose in ((total.training, "train"), (total.evaluation, "evaluate")):
        own = [row for row in steps if row["purpose"] == purpose]
        assert scope.cloud_flops == sum(row["cloud_flops"] for row in own) > 0
        assert scope.wire_bytes == sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in own)
    share = 100 * total.training.cloud_flops / (total.training.cloud_flops + total.edge_flops)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"<dt>Cloud&rsquo;s share</dt><dd>{share:.0f} %" in page
    assert "<dt>Download</dt>" in page


def test_local_names_the_weights_and_leaves_out_electricity_aloud(folder: Path) -> None:
    costs = summarise([folder])
    by_mode = {mode.mode: mode for mode in costs.modes}
    (edge,) = costs.edges
    assert edge.weight_bytes is not None
    assert edge.model_bytes is not None
    assert by_mode["local"].download_bytes == edge.model_bytes > edge.weight_bytes
    assert by_mode["top"].download_bytes == edge.weight_bytes
    assert "Left out in every row are the download" in to_html(costs)


def test_bytes_in_metrics_are_a_steps_own_over_evaluations_and_resumes(
    cloud: InProcessCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "weights"))
    recipe = _recipe(tmp_path, cloud)
    run = run_recipe(recipe, console=quiet()[0]).folder
    for newer in run.checkpoints.glob("step-4"):
        newer.rename(tmp_path / "lost")
    run_recipe(recipe, resume=True, console=quiet()[0])
    by_step: dict[int, int] = {}
    moved = 0
    for row in read_ledger(run.ledger):
        if row["row"] == "step" and row["purpose"] == "train":
            moved += row["wire_up_bytes"]
        elif row["row"] == "optimizer_step":
            by_step[row["n"]], moved = moved, 0
    with run.metrics.open(encoding="utf-8", newline="") as file:
        told = {int(row["optimizer_step"]): int(row["wire_up_bytes"]) for row in csv.DictReader(file)}
    assert told == by_step
    assert len(told) == 4


def test_the_adapter_names_its_base_model(cloud: InProcessCloud, folder: Path) -> None:
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == cloud.card.model != ""


def test_runs_of_several_modes_stay_apart(tmp_path: Path) -> None:
    ushape = fake_run(tmp_path / "whole", steps=4)
    top = fake_run(tmp_path / "upper", steps=4, mode="top", cut="4:8")
    kept = [row for row in read_ledger(top / "ledger.jsonl") if row.get("kind") != "backward"]
    (top / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    for runs in ([ushape, top], [top, ushape]):
        costs = summarise(runs)
        measured = {mode.edges[0]: mode for mode in costs.modes if mode.measured}
        assert {name: mode.mode for name, mode in measured.items()} == {
            "whole": "ushape",
            "upper": "top",
        }
        for edge in costs.edges:
            moved = [edge.traffic[kind] for kind in edge.cloud_flops]
            payload = sum(part.payload_up_bytes + part.payload_down_bytes for part in moved)
            assert measured[edge.name].payload_bytes == payload
        page = re.sub(r"\s+", " ", to_html(costs))
        assert "It did receive the gradients at the cut of whole in 4 training steps" in page
        assert "mode <code>ushape</code>, cut <code>4:4</code>" in page
        assert "mode <code>top</code>, cut <code>4:8</code>" in page
    assert "No gradient crossed." in to_html(summarise([top]))
