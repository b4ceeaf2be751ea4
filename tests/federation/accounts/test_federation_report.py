"""Every number of the report is a sum of ledger rows: the server's, the edges', the cloud's, and Flower's."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, Message

from support.federations import Playground, spoiled
from support.in_process import InProcessCloud
from tightbeam.common.accounts.prices import Prices
from tightbeam.common.errors import DataError
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.report.modes import TokenBytes
from tightbeam.federation.accounts.from_ledger import account
from tightbeam.federation.accounts.report import write_report
from tightbeam.federation.scenario import Scenario, load_scenario

CHANGES: dict[str, Any] = {
    "clients": 4,
    "rounds": 3,
    "sample": 3,
    "eval_sample": 4,
    "eval_every": 2,
    "target_loss": 5.5,
    "faults": {"dropout": 0.2},
    "train": {"lr": 2e-2},
}


@pytest.fixture
def finished(playground: Playground) -> Scenario:
    scenario = playground.scenario(**CHANGES)
    playground.run(scenario)
    return scenario


def _edge_rows(scenario: Scenario, client: str) -> list[dict[str, Any]]:
    return read_ledger(scenario.folder / "clients" / client / "ledger.jsonl")


def test_the_servers_rows_are_the_sums_of_the_edges_own_steps(finished: Scenario) -> None:
    rows = read_ledger(finished.folder / "ledger.jsonl")
    counted = [row for row in rows if row.get("status") == "ok"]
    assert counted
    for row in counted:
        steps = [
            s for s in _edge_rows(finished, row["client"]) if s["row"] == "step" and s["run"] == row["run"]
        ]
        assert steps
        for name in ("wire_up_bytes", "wire_down_bytes", "payload_up_bytes", "cloud_flops"):
            assert row[name] == sum(step[name] for step in steps), name


def test_the_cloud_bills_what_the_report_says(
    finished: Scenario, federation_cloud: InProcessCloud, playground: Playground
) -> None:
    report = playground.report(finished)
    rows = read_ledger(finished.folder / "ledger.jsonl")
    runs = {row["run"] for row in rows if row.get("run")}
    billed = sum(
        usage.bytes.wire_up_bytes + usage.bytes.wire_down_bytes
        for tenant in {row["client"] for row in rows if "client" in row}
        for usage in federation_cloud.ledger.usage(f"insecure/{tenant}", sorted(runs))
        if usage.run in runs
    )
    total = report["total"]
    assert billed == total["activation_up_bytes"] + total["activation_down_bytes"] > 0


def test_adapters_are_counted_as_flower_counts_them(playground: Playground) -> None:
    """Our per-round totals against `ArrayRecord.count_bytes` of the messages themselves."""
    counted: dict[str, int] = {"up": 0}

    def count(client: int, reply: Message) -> None:
        if reply.has_content():
            counted["up"] += sum(
                r.count_bytes() for r in reply.content.values() if isinstance(r, ArrayRecord)
            )

    scenario = playground.scenario()
    playground.run_with(scenario, spoiled(count))
    rounds = account(scenario.folder, scenario).rounds
    assert sum(one.training.adapter_up_bytes for one in rounds) == counted["up"] > 0
    for row in playground.rows(scenario, "client_round"):
        assert row["message_up_bytes"] > row["adapter_up_bytes"]
        assert row["message_down_bytes"] > row["adapter_down_bytes"] > 0


def test_sums_per_client_per_round_and_in_all_agree(finished: Scenario, playground: Playground) -> None:
    report = playground.report(finished)
    rows = read_ledger(finished.folder / "ledger.jsonl")
    rounds = {r["round"] for r in report["rounds"]}
    for name in ("activation_up_bytes", "adapter_down_bytes", "tokens", "edge_flops", "joules"):
        by_client = sum(c["training"][name] + c["evaluation"][name] for c in report["clients"])
        assert by_client == pytest.approx(report["total"][name])
        raw = name.replace("activation", "wire")
        first = sum(
            row.get(raw, 0) for row in rows if row["row"] == "client_eval" and row["round"] not in rounds
        )
        by_round = sum(r["training"][name] + r["evaluation"][name] for r in report["rounds"])
        assert by_round + first == pytest.approx(report["total"][name])
    assert [r["updates"] for r in report["rounds"]] == [r["statuses"].get("ok", 0) for r in report["rounds"]]


def test_weights_are_charged_once_to_every_client(finished: Scenario, playground: Playground) -> None:
    rows = read_ledger(finished.folder / "ledger.jsonl")
    charged = [row["client"] for row in rows if row.get("weight_bytes")]
    assert sorted(charged) == [profile.name for profile in finished.profiles()]
    sizes = {row["weight_bytes"] for row in rows if row.get("weight_bytes")}
    assert len(sizes) == 1
    assert playground.report(finished)["total"]["weight_bytes"] == 4 * sizes.pop()


def test_fairness_and_time_to_accuracy_follow_from_the_rows(
    finished: Scenario, playground: Playground
) -> None:
    report = playground.report(finished)
    rows = read_ledger(finished.folder / "ledger.jsonl")
    for found in report["evaluations"]:
        losses = sorted(
            row["loss"] for row in rows if row["row"] == "client_eval" and row["round"] == found["round"]
        )
        assert (found["best"], found["worst"]) == (losses[0], losses[-1])
        assert found["median"] == losses[len(losses) // 2]
    reached = next(e for e in report["evaluations"] if e["loss"] <= 5.5)
    assert report["reached_target"] == reached
    took = [
        row["virtual_s"]
        for row in rows
        if row["row"] in ("round", "evaluation") and row["round"] <= reached["round"]
    ]
    assert reached["virtual_s"] == pytest.approx(sum(took))


def test_money_is_the_price_tables_by_hand(finished: Scenario) -> None:
    prices = Prices(per_gigabyte=2.0, per_petaflop=3.0, per_kilowatt_hour=5.0)
    found = account(finished.folder, finished, prices)
    total = found.total
    by_hand = total.moved_bytes / 1e9 * 2 + total.cloud_flops / 1e15 * 3 + total.joules / 3.6e6 * 5
    assert total.money == pytest.approx(by_hand)
    assert found.alternatives[0].money == pytest.approx(by_hand)


def test_alternatives_by_hand(finished: Scenario, playground: Playground) -> None:
    found = {one.name: one for one in account(finished.folder, finished).alternatives}
    rows = [r for r in read_ledger(finished.folder / "ledger.jsonl") if r.get("status") == "ok"]
    backbone = playground.rows(finished, "experiment")[0]["backbone"]
    trained = sum(row["tokens"] for row in rows if row["row"] == "client_round")
    evaluated = sum(row["tokens"] for row in rows if row["row"] == "client_eval")
    flops = backbone["weight_bytes"] // 4 * (4 * trained + 2 * evaluated)
    assert found["central LoRA"].cloud_flops == found["whole model at the edge"].edge_flops == flops
    assert found["whole model at the edge"].weight_bytes == 4 * backbone["weight_bytes"]
    assert found["whole model at the edge"].activation_bytes == 0
    as_it_was, fp32, int8 = (found[name] for name in ("as it was", "ushape, fp32", "ushape, int8"))
    assert fp32.activation_bytes == pytest.approx(as_it_was.activation_bytes, rel=1e-6)
    codecs = dict.fromkeys(("activations_up", "activations_down", "gradients_up", "gradients_down"), "int8")
    row = TokenBytes.of(backbone["hidden_size"], codecs)
    payload = trained * row.training + evaluated * row.forward
    ratio = as_it_was.activation_bytes / sum(r["payload_up_bytes"] + r["payload_down_bytes"] for r in rows)
    assert int8.activation_bytes == pytest.approx(payload * ratio, rel=1e-6)
    assert found["top, bf16, cached"].activation_bytes < found["ushape, bf16"].activation_bytes


def test_the_page_stands_alone_and_the_table_has_all(finished: Scenario, playground: Playground) -> None:
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    for name in ("client-00", "client-03", "whole model at the edge", "was reached after round"):
        assert name in page
    with (finished.folder / "federation.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    report = playground.report(finished)
    ups = [int(r["value"]) for r in lines if (r["of"], r["quantity"]) == ("client", "activation_up_bytes")]
    assert sum(ups) == report["total"]["activation_up_bytes"]


def test_texts_from_clients_are_escaped(playground: Playground) -> None:
    scenario = playground.scenario(rounds=1)
    playground.run(scenario)
    path = scenario.folder / "ledger.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    told = {"status": "failed", "reason": "<script>alert(1)</script>"}
    next(row for row in rows if row["row"] == "client_round").update(told)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = write_report(scenario.folder, scenario).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_scenario_that_is_kept_is_the_one_that_ran(playground: Playground) -> None:
    groups = {name: {"clients": 1, "cut": cut} for name, cut in (("zeta", "2:2"), ("alpha", "1:1"))}
    scenario = playground.scenario(rounds=1, groups=groups)
    playground.run(scenario)
    assert load_scenario(scenario.folder / "scenario.yaml").profiles() == scenario.profiles()
    report = playground.report(scenario)
    assert [client["cut"] for client in report["clients"]] == ["2:2", "1:1", "1:1"]


def test_a_folder_without_an_experiment_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read the ledger"):
        account(tmp_path)
    (tmp_path / "ledger.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds no experiment that has begun"):
        account(tmp_path)
