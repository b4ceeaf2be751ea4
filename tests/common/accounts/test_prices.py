"""Bills and energy by hand, and price tables that cannot be used."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from tightbeam.common.accounts.prices import Prices
from tightbeam.common.errors import UsageError

ROUND = Prices(
    currency="EUR", per_gigabyte=2, per_petaflop=3, per_kilowatt_hour=0.5, edge_watts=100, cloud_watts=1000
)


def test_bill_by_hand() -> None:
    bill = ROUND.bill(wire_bytes=1_500_000_000, cloud_flops=2 * 10**15, edge_joules=3.6e6)
    assert (bill.traffic, bill.cloud_compute, bill.edge_electricity) == (3.0, 6.0, 0.5)
    assert bill.total == 9.5


def test_energy_by_hand() -> None:
    energy = ROUND.energy(edge_s=60, cloud_compute_s=3)
    assert (energy.edge_joules, energy.cloud_joules, energy.total_joules) == (6000, 3000, 9000)


def test_a_file_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("currency: CHF\nper_gigabyte: 0\n")
    assert Prices.load(path) == Prices(currency="CHF", per_gigabyte=0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("per_terabyte: 1", ":2: unknown key per_terabyte. Did you mean per_gigabyte? Known keys: curr"),
        ("per_gigabyte: -1", ":2: per_gigabyte should be at least 0, not -1. Known keys: currency, per_"),
        ("per_gigabyte: .nan", ":2: per_gigabyte should be a number, not '.nan'"),
        ("per_gigabyte: cheap", ":2: per_gigabyte should be a number, not 'cheap'"),
        ('currency: "\\e[2J"', ":2: currency is refused: holds characters that cannot be printed"),
        ("- 1", "holds list at its top level"),
        ("", "is empty, not keys and values"),
        ("a: [", ":2 is not valid YAML"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(f"# ours\n{text}")
    with pytest.raises(UsageError) as caught:
        Prices.load(path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml"):
        Prices.load(tmp_path / "none.yaml")


def test_prices_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        ROUND.per_gigabyte = 1.0


@pytest.mark.parametrize("field", Prices.model_fields)
def test_every_price_says_its_unit(field: str) -> None:
    assert Prices.model_fields[field].description
