"""Every figure of the federation report against a second count, and wrong rows that the count finds."""

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from support.federations import Playground
from support.flower_count import FlowerCount
from support.in_process import InProcessCloud
from support.recounting import Recount, differences, leaves
from support.recounting_rows import Clients
from tightbeam.edge.report import units
from tightbeam.federation.accounts.from_ledger import account
from tightbeam.federation.accounts.report import to_html, write_report
from tightbeam.federation.scenario import Scenario

CHANGES: dict[str, Any] = {
    "clients": 4,
    "rounds": 3,
    "sample": 3,
    "eval_sample": 4,
    "eval_every": 2,
    "target_loss": 5.5,
    "faults": {"dropout": 0.2, "straggler": 0.4, "slowdown": 3},
    "client": {"cut": "1:1", "r": 4, "network": "4g", "device": "phone"},
    "train": {"lr": 2e-2},
}


@dataclass(frozen=True)
class Finished:
    """An experiment that was watched by Flower's own count."""

    scenario: Scenario
    folder: Path
    sizes: dict[str, int]  # of the cloud's weights
    flower: FlowerCount

    def recount(self) -> dict[str, Any]:
        return Recount(self.scenario, self.folder, self.sizes, self.flower).report()

    def report(self) -> dict[str, Any]:
        return account(self.folder, self.scenario).model_dump(mode="json")


@pytest.fixture(scope="module")
def finished(
    federation_cloud: InProcessCloud, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    playground = Playground(federation_cloud.address, tmp_path_factory.mktemp("figures"), backbone)
    scenario, flower = playground.scenario(**CHANGES), FlowerCount()
    playground.run_with(scenario, flower)
    write_report(scenario.folder, scenario)
    return Finished(scenario, scenario.folder, Clients.sizes_at(federation_cloud.address), flower)


def test_every_figure_is_that_of_a_second_count(finished: Finished) -> None:
    written = json.loads((finished.folder / "federation.json").read_text(encoding="utf-8"))
    assert differences(written, finished.recount()) == []
    assert len([value for _, value in leaves(written) if isinstance(value, float | int)]) > 300
    statuses = {status for one in written["rounds"] for status in one["statuses"]}
    assert "dropped" in statuses, "nobody dropped out, so the count was of an easy case"


def test_each_rounds_adapters_are_flowers_own_count_both_ways(finished: Finished) -> None:
    rounds = finished.report()["rounds"]
    for one in rounds:
        for phase, kind in (("training", "client_round"), ("evaluation", "client_eval")):
            for way in ("up", "down"):
                messages = [
                    n
                    for key, n in finished.flower.moved.items()
                    if key[:2] == (kind, one["round"]) and key[3] == way
                ]
                assert one[phase][f"adapter_{way}_bytes"] == sum(messages)
    assert min(one["training"]["adapter_up_bytes"] for one in rounds) > 0


def plant(finished: Finished, folder: Path, kind: str, field: str) -> Finished:
    """The same experiment, but one figure of its first such row in the server's ledger is off by one."""
    lines = (finished.folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    next(row for row in rows if row["row"] == kind and row.get("status", "ok") == "ok")[field] += 1
    (folder / "clients").symlink_to(finished.folder / "clients")
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Finished(finished.scenario, folder, finished.sizes, finished.flower)


@pytest.mark.parametrize("kind", ["client_round", "client_eval"])
@pytest.mark.parametrize(
    "field",
    [
        "wire_up_bytes",
        "wire_down_bytes",
        "payload_up_bytes",
        "tokens",
        "cloud_flops",
        "edge_flops",
        "adapter_up_bytes",
        "adapter_down_bytes",
        "weight_bytes",
        "joules",
        "loss",
    ],
)
def test_a_wrong_row_is_found(finished: Finished, tmp_path: Path, kind: str, field: str) -> None:
    planted = plant(finished, tmp_path, kind, field)
    assert differences(planted.report(), planted.recount())


@pytest.mark.parametrize("field", ["virtual_s", "loss", "updates"])
def test_a_wrong_round_is_found(finished: Finished, tmp_path: Path, field: str) -> None:
    planted = plant(finished, tmp_path, "round", field)
    assert any(f"/{field}" in path for path in differences(planted.report(), planted.recount()))


@pytest.mark.parametrize("field", ["loss", "worst", "median", "best", "virtual_s", "clients"])
def test_a_wrong_evaluation_is_found(finished: Finished, tmp_path: Path, field: str) -> None:
    planted = plant(finished, tmp_path, "evaluation", field)
    assert any(f"/{field}" in path for path in differences(planted.report(), planted.recount()))


class Page(HTMLParser):
    """What a reader sees: cells of each table by row, and the figures at the top by their name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.figures: dict[str, list[str]] = {}
        self._into: list[str] | None = None
        self._small = False  # words below a figure
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self._into = self.tables[-1][-1]
            self._into.append("")
        elif tag == "dt":
            self._into = [""]
        elif tag == "dd":
            assert self._into is not None
            self._into = self.figures.setdefault(self._into[-1], [""])
        elif tag == "small" and self._into is not None:
            self._small = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "small":
            self._small = False
        if tag in ("th", "td", "dd"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None and not self._small:
            self._into[-1] += data


def costs_of(one: dict[str, Any], *names: str) -> int:
    return sum(one[phase][name] for phase in ("training", "evaluation") for name in names)


def both(kind: str) -> tuple[str, str]:
    return f"{kind}_up_bytes", f"{kind}_down_bytes"


def round_cells(one: dict[str, Any]) -> list[str]:
    cost, loss, error = one["training"], one["loss"], one["relative_error"]
    others = ", ".join(f"{n} {status}" for status, n in one["statuses"].items() if status != "ok")
    return [
        str(one["round"]),
        str(one["updates"]),
        others,
        "\u2013" if loss is None else f"{loss:.4f}",
        *(units.bytes_text(cost[name]) for name in both("activation") + both("adapter")),
        *(units.flops_text(cost[name]) for name in ("edge_flops", "cloud_flops")),
        units.joules_text(cost["joules"]),
        units.seconds_text(one["virtual_s"]),
        waited_for(one["slow"]),
        "\u2013" if error is None else f"{error:.1e}",
    ]


def waited_for(slow: dict[str, float]) -> str:
    if not slow:
        return ""
    name = max(slow, key=slow.__getitem__)
    return f"{name} ({slow[name]:.1f} x)" + (f" +{len(slow) - 1}" if len(slow) > 1 else "")


def evaluation_cells(one: dict[str, Any]) -> list[str]:
    return [
        str(one["round"]),
        str(one["clients"]),
        f"{one['loss']:.4f}",
        f"{one['worst']:.4f}",
        one["worst_client"],
        f"{one['median']:.4f}",
        f"{one['best']:.4f}",
        one["best_client"],
        f"{one['worst'] - one['best']:.4f}",
        units.seconds_text(one["virtual_s"]),
        units.bytes_text(one["moved_bytes"]),
    ]


def client_cells(one: dict[str, Any]) -> list[str]:
    return [
        one["name"],
        one["group"],
        f"{one['mode']} {one['cut']}, {one['r']}",
        str(one["rounds"]),
        str(one["slow_rounds"] or ""),
        f"{one['first_loss']:.3f} \u2192 {one['last_loss']:.3f}",
        units.bytes_text(costs_of(one, *both("activation"))),
        units.bytes_text(costs_of(one, *both("adapter"))),
        units.bytes_text(costs_of(one, "weight_bytes")),
        units.flops_text(costs_of(one, "edge_flops")),
        units.joules_text(costs_of(one, "joules")),
        units.money_text(costs_of(one, "money"), "USD"),
        units.seconds_text(one["virtual_s"]),
    ]


def alternative_cells(one: dict[str, Any]) -> list[str]:
    return [
        one["name"],
        units.money_text(one["money"], "USD"),
        "measured" if one["measured"] else "computed",
        *(units.bytes_text(round(one[f"{kind}_bytes"])) for kind in ("activation", "adapter", "weight")),
        *(units.flops_text(round(one[f"{side}_flops"])) for side in ("edge", "cloud")),
        units.joules_text(one["joules"]),
    ]


def test_the_page_shows_these_figures(finished: Finished) -> None:
    text = (finished.folder / "report.html").read_text(encoding="utf-8")
    page, found = Page(text), finished.recount()
    fairness, rounds, clients, absences, alternatives = (table[1:] for table in page.tables)
    assert fairness == [evaluation_cells(one) for one in found["evaluations"]]
    assert absences == [
        [one["status"], str(one["times"]), one["reason"], ", ".join(one["clients"])]
        for one in found["absences"]
    ]
    cells = [[" ".join(cell.split()) for cell in row] for row in rounds]
    assert cells == [round_cells(one) for one in found["rounds"]]
    assert clients == [client_cells(one) for one in found["clients"]]
    assert alternatives == [alternative_cells(one) for one in found["alternatives"]]
    better = sum(one["last_loss"] < one["first_loss"] for one in found["clients"])
    assert f"It fell at {better} of 4 clients." in text
    total, first, last = found["total"], found["evaluations"][0], found["evaluations"][-1]
    top = {name: value for name, (value,) in page.figures.items()}
    assert top == {
        "Held-out loss": f"{first['loss']:.2f} \u2192 {last['loss']:.2f}",
        "Worst client": f"{first['worst']:.2f} \u2192 {last['worst']:.2f}",
        "Activations": units.bytes_text(sum(total[name] for name in both("activation"))),
        "Adapters": units.bytes_text(sum(total[name] for name in both("adapter"))),
        "Time": units.seconds_text(found["virtual_s"]),
        "Price": units.money_text(total["money"], "USD"),
        "Energy": units.joules_text(total["joules"]),
    }
    assert f"best {first['best']:.2f} &rarr; {last['best']:.2f}" in text
    reached = found["reached_target"]
    took, moved = units.seconds_text(reached["virtual_s"]), units.bytes_text(reached["moved_bytes"])
    assert f"was reached after round {reached['round']}: {took} virtual, {moved} moved" in text
    whole = next(one for one in found["alternatives"] if one["name"] == "whole model at the edge")
    ours, theirs = sum(total[name] for name in both("adapter")) / 2**20, whole["adapter_bytes"] / 2**20
    assert f"moved {ours:.1f} MB and the whole model at the edge would have moved {theirs:.1f} MB" in text


def test_another_figure_gives_another_page(finished: Finished) -> None:
    found = account(finished.folder, finished.scenario)
    kept = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert to_html(found) == kept
    one = found.rounds[1]
    changed = one.model_copy(update={"training": one.training.model_copy(update={"joules": 5.0})})
    page = Page(to_html(found.model_copy(update={"rounds": [found.rounds[0], changed, found.rounds[2]]})))
    assert "5.00 J" in page.tables[1][2]
