"""What bytes, operations and seconds are worth: price lists, and the bill and energy that follow from them.

Decimal units, as on bills: a gigabyte is 1e9 bytes, a petaflop here is 1e15 operations (not per second).
Each price has a source: your own table, else the list that the cloud's identity has signed, else a default,
which is the order of magnitude of public list prices and is called assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tightbeam.common.errors import UsageError
from tightbeam.common.settings.sections import Section, checked_section
from tightbeam.common.settings.yaml_text import read_mapping

__all__ = ["ASSUMED", "CLOUD", "TABLE", "Bill", "Energy", "PriceList", "Prices", "Tariff"]

TABLE: Final = "your price table"
CLOUD: Final = "the cloud's price list"
ASSUMED: Final = "assumed"
_JOULES_PER_KILOWATT_HOUR = 3.6e6
_EDGE_WATTS = {"cpu": 45.0, "mps": 45.0, "cuda": 350.0}
_CLOUD_WATTS = {"cpu": 65.0, "mps": 45.0, "cuda": 700.0}


class Energy(BaseModel):
    """Energy of a run, in joules."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edge_joules: float
    cloud_joules: float

    @property
    def total_joules(self) -> float:
        """Both sides."""
        return self.edge_joules + self.cloud_joules


class Bill(BaseModel):
    """Money of a run, in the price table's currency."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    traffic: float
    """What the cloud asks for wire bytes, both directions."""
    cloud_compute: float
    """What the cloud asks for its operations; its electricity is in that price."""
    edge_electricity: float
    """What the edge pays its own utility."""
    total: float


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds characters that cannot be printed")
    return text


class PriceList(Section):
    """What a cloud asks; every field has its unit in its description."""

    currency: Annotated[str, AfterValidator(_printable)] = Field(
        default="USD", min_length=1, max_length=16, description="Unit of all money."
    )
    per_gigabyte: float = Field(
        default=0.09, ge=0, description="Per 1e9 wire bytes, both directions; usual egress list price."
    )
    per_petaflop: float = Field(
        default=0.005,
        ge=0,
        description="Per 1e15 cloud operations; a 2.50 USD/h accelerator at 140 TFLOP/s sustained.",
    )

    def money(self, *, wire_bytes: float = 0, cloud_flops: float = 0) -> float:
        """What the cloud asks for so much."""
        return wire_bytes / 1e9 * self.per_gigabyte + cloud_flops / 1e15 * self.per_petaflop

    def text(self) -> str:
        """In words, for one line."""
        return f"{self.per_gigabyte:g} per GB and {self.per_petaflop:g} per PFLOP, in {self.currency}"


class Prices(PriceList):
    """A price table: a cloud's prices and the edge's own."""

    per_kilowatt_hour: float = Field(default=0.30, ge=0, description="Per kilowatt-hour at the edge.")
    edge_watts: float | None = Field(
        default=None, ge=0, description="Draw of one edge while it trains, watts; else by kind of device."
    )
    cloud_watts: float | None = Field(
        default=None, ge=0, description="Draw of the cloud's device while it computes, watts; else by kind."
    )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file with some or all of the fields.

        Raises:
            UsageError: the file cannot be read, or a key or value is wrong.

        """
        mapping, lines = read_mapping(path, "price table", "docs/costs.md")
        cure = f"Known keys: {', '.join(cls.model_fields)}; docs/costs.md gives their units."
        return checked_section(cls, mapping, origin=str(path), lines=lines, cure=cure)

    def watts(self, edge_device: str = "cpu", cloud_device: str = "cuda") -> tuple[float, float]:
        """Of edge and cloud while they compute; by the kind of device where the table does not say."""
        edge, cloud = self.edge_watts, self.cloud_watts
        if edge is None:
            edge = _EDGE_WATTS.get(edge_device.partition(":")[0], _EDGE_WATTS["cpu"])
        if cloud is None:
            cloud = _CLOUD_WATTS.get(cloud_device.partition(":")[0], _CLOUD_WATTS["cuda"])
        return edge, cloud

    def energy(
        self, *, edge_s: float, cloud_compute_s: float, edge_device: str = "cpu", cloud_device: str = "cuda"
    ) -> Energy:
        """Estimate joules from seconds: the edge draws while it trains, the cloud while it computes."""
        edge, cloud = self.watts(edge_device, cloud_device)
        return Energy(edge_joules=edge_s * edge, cloud_joules=cloud_compute_s * cloud)

    def electricity(self, joules: float) -> float:
        """What the edge's utility asks."""
        return joules / _JOULES_PER_KILOWATT_HOUR * self.per_kilowatt_hour

    def bill(self, *, wire_bytes: int, cloud_flops: int, edge_joules: float) -> Bill:
        """Price what a run used."""
        traffic, compute = self.money(wire_bytes=wire_bytes), self.money(cloud_flops=cloud_flops)
        electricity = self.electricity(edge_joules)
        return Bill(
            traffic=traffic,
            cloud_compute=compute,
            edge_electricity=electricity,
            total=traffic + compute + electricity,
        )


@dataclass(frozen=True, slots=True)
class Tariff:
    """The prices that count, and who says so."""

    prices: Prices
    sources: Mapping[str, str]
    """By field of `Prices`: `TABLE`, `CLOUD` or `ASSUMED`."""

    @classmethod
    def of(cls, offer: PriceList | None = None, table: Prices | None = None) -> Self:
        """Your own table goes before what the cloud asks, and that before what is assumed.

        Raises:
            UsageError: the table has another currency than the cloud, and lacks a price that the cloud has.

        """
        said = {} if table is None else {name: getattr(table, name) for name in table.model_fields_set}
        asked: dict[str, Any] = {} if offer is None else offer.model_dump()
        lacking = [name for name in asked if name not in said]
        if lacking and asked["currency"] != said.get("currency", asked["currency"]):
            raise UsageError(
                f"The price table is in {said['currency']}, the cloud's {' and '.join(lacking)} in "
                f"{asked['currency']}.",
                cure=f"Give {' and '.join(lacking)} in the table too.",
            )
        sources = {n: TABLE if n in said else CLOUD if n in asked else ASSUMED for n in Prices.model_fields}
        return cls(Prices.model_validate(asked | said), sources)
