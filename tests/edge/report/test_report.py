"""The written files: self-contained, escaped, whole or not at all; and the table."""

import csv
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from support.fake_run import fake_run
from tightbeam.common.errors import TightbeamError
from tightbeam.edge.report import units
from tightbeam.edge.report.report import to_csv, to_html, write_report
from tightbeam.edge.report.schema import Costs
from tightbeam.edge.report.summary import summarise
from tightbeam.edge.report.table import print_table


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Costs:
    base = tmp_path_factory.mktemp("runs")
    return summarise([fake_run(base / name, steps=8, seed=seed) for seed, name in enumerate("ab")])


@pytest.fixture(scope="module")
def page(costs: Costs) -> str:
    return to_html(costs)


class _Outline(HTMLParser):
    """Open tags, ids and attributes of a page."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.unbalanced: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value for name, value in attrs if name in {"src", "href", "xlink:href"} and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


def _outline(page: str) -> _Outline:
    outline = _Outline()
    outline.feed(page)
    return outline


def test_the_page_needs_no_network_and_no_script(page: str) -> None:
    outline = _outline(page)
    assert all(address.startswith("#") for address in outline.addresses)
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_the_page_is_well_formed_and_ids_are_unique(page: str) -> None:
    outline = _outline(page)
    assert outline.unbalanced == []
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))


def test_pictures_take_their_colours_from_the_page(page: str) -> None:
    assert page.count("<svg") == 4
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", pictures) == []
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark, paper = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    for theme in (light, dark, paper):
        assert used <= set(re.findall(r"(--\w+):", theme))
    assert "prefers-color-scheme: dark" in page


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_every_theme(page: str) -> None:
    """WCAG 2.1: 4.5 for text, 3 for graphics."""
    least = {"ink": 7.0, "muted": 4.5, "warn": 4.5} | {f"c{index}": 3.0 for index in range(1, 8)}
    for theme in re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme))
        for name, wanted in least.items():
            dark, light = sorted((_luminance(colours["paper"]), _luminance(colours[name])))
            assert (light + 0.05) / (dark + 0.05) >= wanted, name


def test_the_page_is_honest(page: str) -> None:
    text = re.sub(r"\s+", " ", page)
    assert "can be inverted to the text" in text
    assert "computed, not measured" in text
    assert "Energy is estimated, not measured" in text
    assert "no labels" in text


def test_texts_from_a_ledger_are_escaped(tmp_path: Path) -> None:
    page = to_html(summarise([fake_run(tmp_path / "<i>edge", steps=2, model="<script>alert(1)</script>")]))
    assert "<script>" not in page
    assert "<i>edge" not in page
    assert "&lt;script&gt;" in page


def test_the_same_costs_give_the_same_page(costs: Costs, page: str) -> None:
    assert to_html(costs) == page


@pytest.mark.parametrize("num_edges", [1, 9])
def test_few_and_many_edges(tmp_path: Path, num_edges: int) -> None:
    costs = summarise([fake_run(tmp_path / f"e{i}", steps=2, seed=i) for i in range(num_edges)])
    assert _outline(to_html(costs)).unbalanced == []


def test_a_run_without_hidden_size_or_evaluation(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "bare", steps=2, hidden_size=None)
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_text("".join(line for line in lines if '"row":"eval"' not in line))
    page = to_html(summarise([folder]))
    assert "other modes" not in page
    assert "Evaluation loss" not in page


def test_write_report_writes_three_files(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=2)
    page = write_report([run], tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert sorted(p.name for p in page.parent.iterdir()) == ["costs.csv", "costs.json", "report.html"]
    assert Costs.from_json((page.parent / "costs.json").read_bytes()) == summarise([run])


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TightbeamError, match="Cannot write"):
        write_report([run], tmp_path / "file" / "out")


def test_csv_holds_the_figures(costs: Costs) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(costs))))
    values = {(line["edge"], line["quantity"]): float(line["value"]) for line in lines}
    for edge in costs.edges:
        assert values[edge.name, "forward_wire_up"] == edge.traffic["forward"].wire_up_bytes
        assert values[edge.name, "network_seconds"] == edge.seconds.network
    assert {line["unit"] for line in lines} == {"bytes", "flop", "s", "steps", "tokens"}


def test_the_table_says_the_same(costs: Costs) -> None:
    out = io.StringIO()
    print_table(costs, Console(file=out, width=120))
    text = out.getvalue()
    for edge in costs.edges:
        assert edge.name in text
        assert units.count_text(edge.training_tokens) in text
    assert units.money_text(costs.total.bill.total, "USD") in text
    assert "computed, not measured" in text


def test_only_the_page_loads_matplotlib() -> None:
    code = (
        "import sys, tightbeam.common.accounts, tightbeam.edge.report.report, tightbeam.edge.report.table\n"
        "print([name for name in ('matplotlib', 'torch', 'transformers', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.bytes_text(0), "0 B"),
        (units.bytes_text(999), "999 B"),
        (units.bytes_text(999_900), "1.00 MB"),
        (units.bytes_text(12_345_678), "12.3 MB"),
        (units.flops_text(1.5e15), "1.50 PFLOP"),
        (units.joules_text(4500), "4.50 kJ"),
        (units.seconds_text(0.01234), "0.0123 s"),
        (units.seconds_text(45.25), "45.2 s"),
        (units.seconds_text(200), "3 min 20 s"),
        (units.seconds_text(7500), "2 h 05 min"),
        (units.money_text(0, "EUR"), "0.00 EUR"),
        (units.money_text(12.345, "EUR"), "12.35 EUR"),
        (units.money_text(0.00312, "EUR"), "0.0031 EUR"),
        (units.count_text(1234567), "1\u202f234\u202f567"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected
