"""What bytes, operations and seconds are worth: the price table, and the bill and energy that follow from it.

Decimal units, as on bills: a gigabyte is 1e9 bytes, a petaflop here is 1e15 operations (not per second).
The defaults are the order of magnitude of public list prices and are meant to be replaced.
"""

from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tightbeam.common.errors import UsageError

__all__ = ["Bill", "Energy", "Prices"]

_JOULES_PER_KILOWATT_HOUR = 3.6e6


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


class Prices(BaseModel):
    """A price table; every field has its unit in its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    currency: str = Field(default="USD", description="Unit of all money.")
    per_gigabyte: float = Field(
        default=0.09, ge=0, description="Per 1e9 wire bytes, both directions; usual egress list price."
    )
    per_petaflop: float = Field(
        default=0.005,
        ge=0,
        description="Per 1e15 cloud operations; a 2.50 USD/h accelerator at 140 TFLOP/s sustained.",
    )
    per_kilowatt_hour: float = Field(default=0.30, ge=0, description="Per kilowatt-hour at the edge.")
    edge_watts: float = Field(
        default=45.0, ge=0, description="Draw of one edge while it trains, watts; a laptop under load."
    )
    cloud_watts: float = Field(
        default=700.0, ge=0, description="Draw of the cloud's device while it computes, watts."
    )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file with some or all of the fields.

        Raises:
            UsageError: the file cannot be read, or a key or value is wrong.

        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            return cls.model_validate({} if data is None else data)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
            raise UsageError(
                f"The price table {path} cannot be used: {error}.",
                cure=f"Known keys: {', '.join(cls.model_fields)}. docs/costs.md gives their units.",
            ) from error

    def energy(self, *, edge_s: float, cloud_compute_s: float) -> Energy:
        """Estimate joules from seconds: the edge draws while it trains, the cloud while it computes."""
        return Energy(edge_joules=edge_s * self.edge_watts, cloud_joules=cloud_compute_s * self.cloud_watts)

    def bill(self, *, wire_bytes: int, cloud_flops: int, edge_joules: float) -> Bill:
        """Price what a run used."""
        traffic = wire_bytes / 1e9 * self.per_gigabyte
        compute = cloud_flops / 1e15 * self.per_petaflop
        electricity = edge_joules / _JOULES_PER_KILOWATT_HOUR * self.per_kilowatt_hour
        return Bill(
            traffic=traffic,
            cloud_compute=compute,
            edge_electricity=electricity,
            total=traffic + compute + electricity,
        )
