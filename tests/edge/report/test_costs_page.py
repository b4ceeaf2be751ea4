"""docs/costs.md names every field, price and column that exists."""

from pathlib import Path

import pytest

from tightbeam.cloud.ledger_store import STEPS
from tightbeam.common.accounts.prices import Prices
from tightbeam.edge.report.schema import (
    KINDS,
    SCHEMA,
    BillLine,
    Costs,
    Edge,
    ModeCost,
    Prediction,
    Scope,
    Seconds,
    TimeBin,
    Total,
)

TEXT = (Path(__file__).parents[3] / "docs" / "costs.md").read_text(encoding="utf-8")
MODELS = (BillLine, Edge, ModeCost, Prediction, Prices, Scope, Seconds, TimeBin, Total)
NAMES = (
    {name for model in MODELS for name in model.model_fields}
    | set(KINDS)
    | set(Costs.model_fields) - {"schema_"}
)
SUMMARISED = {  # the six byte columns are described by their first and last
    f"{layer}_{way}_bytes" for layer in ("payload", "sealed", "wire") for way in ("up", "down")
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_field_is_described(name: str) -> None:
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("name", sorted(set(STEPS.columns.keys()) - SUMMARISED))
def test_column_is_described(name: str) -> None:
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize(
    "name", ["currency", *(n for n, f in Prices.model_fields.items() if f.default != "USD")]
)
def test_defaults_are_the_real_ones(name: str) -> None:
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}`"))
    written = line.split("|")[2].strip()
    default = Prices.model_fields[name].default
    assert written == (default or "by device") or float(written) == default


def test_schema_version_is_named() -> None:
    assert f"`{SCHEMA}`" in TEXT


def test_an_invented_field_would_be_missed() -> None:
    assert "`no_such_field`" not in TEXT
