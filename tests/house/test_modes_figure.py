"""The picture and the tables of docs/modes.md say what docs/data/modes.jsonl says."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[2]
LINES = ROOT / "docs" / "data" / "modes.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    place = ROOT / "benchmarks" / "plot_modes.py"
    spec = importlib.util.spec_from_file_location("plot_modes", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table_row(row: dict[str, Any]) -> str:
    share, spread = 100 * row["share_of_full_lora_gain"], 100 * row["spread"]
    size = f"{row['bytes_per_token']:,.0f}".replace(",", " ")
    return (
        f"| {row['mode']} | {row['eval_loss']:.4f} | {share:.1f} % | {spread:.1f} | {row['rank']} "
        f"| {row['lr']:g} | {size} |"
    )


def test_the_picture_is_drawn_from_the_lines(plot: ModuleType) -> None:
    kept = (ROOT / "docs" / "images" / "modes.svg").read_text(encoding="utf-8")
    assert kept == plot.draw(plot.read(LINES)), "run benchmarks/plot_modes.py"


def test_another_result_gives_another_picture(plot: ModuleType, tmp_path: Path) -> None:
    changed = tmp_path / "modes.jsonl"
    changed.write_text("".join(json.dumps(row | {"share_of_full_lora_gain": 0.8}) + "\n" for row in ROWS))
    assert plot.draw(plot.read(changed)) != plot.draw(plot.read(LINES))


def test_every_mode_is_a_point_inside_the_picture(plot: ModuleType) -> None:
    drawn = ET.fromstring(plot.draw(plot.read(LINES)))
    name = "{http://www.w3.org/2000/svg}"
    labels = {text.text for text in drawn.iter(f"{name}text")}
    jargon = [row for row in ROWS if row["data"] == "jargon" and row["epochs"] == 3]
    assert {row["mode"] for row in jargon if row["bytes_per_token"]} <= labels
    *_, width, height = (float(part) for part in drawn.attrib["viewBox"].split())
    circles = list(drawn.iter(f"{name}circle"))
    assert len(circles) > len(jargon)  # the legend's too
    assert all(0 < float(c.attrib["cx"]) < width and 0 < float(c.attrib["cy"]) < height for c in circles)


def test_the_tables_hold_the_lines() -> None:
    text = (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")
    section = text[text.index("## What each mode keeps") :].partition("\n## Side by side")[0]
    rows = re.findall(r"^\| [a-z].*\|$", section, flags=re.M)
    assert [row for row in rows if not row.startswith("| mode |")] == [table_row(row) for row in ROWS]
