"""The schema of `federation.json`: what a federated experiment cost per client, per round and in all.

Activations are the wire bytes of steps with the cloud; adapters are the arrays in Flower's messages as Flower
counts them; weights are what a client fetches once. Money and joules follow the price table and the devices
of the scenario. `accounts` fills it in.
"""

from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from tightbeam.common.accounts.prices import Prices
from tightbeam.federation.accounts.alternatives import Alternative
from tightbeam.federation.server.journal import Row
from tightbeam.federation.server.pricing import money_of

__all__ = [
    "Absence",
    "ClientAccount",
    "Costs",
    "Evaluation",
    "Exported",
    "FederationAccount",
    "Headline",
    "LineAccount",
    "PrivacyAccount",
    "RoundAccount",
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Costs(_Model):
    """Sums over rows. `up` is away from the client."""

    activation_up_bytes: int = 0
    activation_down_bytes: int = 0
    adapter_up_bytes: int = 0
    adapter_down_bytes: int = 0
    weight_bytes: int = 0
    tokens: int = 0
    edge_flops: int = 0
    cloud_flops: int = 0
    joules: float = 0.0  # at the edges, from the scenario's devices
    money: float = 0.0
    wall_s: float = 0.0  # of this machine

    @property
    def activation_bytes(self) -> int:
        """Both directions."""
        return self.activation_up_bytes + self.activation_down_bytes

    @property
    def adapter_bytes(self) -> int:
        """Both directions."""
        return self.adapter_up_bytes + self.adapter_down_bytes

    @property
    def moved_bytes(self) -> int:
        """Everything."""
        return self.activation_bytes + self.adapter_bytes + self.weight_bytes

    @classmethod
    def of(cls, rows: Iterable[Row], table: Prices | None = None) -> Self:
        """Sum up; money by what each row's cloud asked for, where `table` does not say otherwise."""
        rows = list(rows)

        def total(name: str) -> Any:
            return sum(row.get(name, 0) for row in rows)

        counts = {
            "activation_up_bytes": total("wire_up_bytes"),
            "activation_down_bytes": total("wire_down_bytes"),
            "adapter_up_bytes": total("adapter_up_bytes"),
            "adapter_down_bytes": total("adapter_down_bytes"),
            "weight_bytes": total("weight_bytes"),
        }
        return cls(
            **counts,
            tokens=total("tokens"),
            edge_flops=total("edge_flops"),
            cloud_flops=total("cloud_flops"),
            joules=total("joules"),
            money=money_of(rows, table),
            wall_s=total("wall_s"),
        )


class PrivacyAccount(_Model):
    """What the published adapters can tell about one client, by Flower's accountant."""

    epsilon: float  # after the last round, without amplification by sampling
    delta: float
    noise_multiplier: float
    clipping_norm: float
    where: str
    clipping: str
    secure: bool  # the clients add the noise themselves


class RoundAccount(_Model):
    """One round."""

    round: int
    updates: int
    statuses: dict[str, int]
    loss: float | None
    relative_error: float | None
    epsilon: float | None = None  # of all rounds up to this one; None without privacy
    secure_bytes: int  # keys, shares, consent and unmasking, both directions; 0 in the open
    virtual_s: float
    median_s: float | None  # virtual seconds of the median client; None when nobody worked
    slow: dict[str, float]  # clients that took over 1.5 times the median, and how many times
    notes: list[str]
    training: Costs
    evaluation: Costs


class Headline(_Model):
    """Held-out loss before and after, over the same clients, nats per learned token."""

    clients: int  # that were evaluated both times
    before: float
    after: float
    worst: tuple[float, float] | None  # the worst client's, before and after; None where only means are known
    best: tuple[float, float] | None
    same_clients: bool  # False in secure runs, which know the mean of whoever took part
    exported: bool  # what is in `adapter/`, all of it; else each client's own part


class Exported(_Model):
    """The written adapter, evaluated by all that could, where it is more than what clients wear in rounds."""

    clients: int
    loss: float
    worst: float
    median: float
    best: float
    absent: dict[str, str]  # who did not evaluate it, and why
    costs: Costs  # beside the experiment: in no other sum


class Evaluation(_Model):
    """Held-out loss of clients, each with its own part of the global adapter, nats per learned token."""

    round: int
    clients: int
    loss: float
    worst: float | None  # None in secure runs, which know the mean alone
    median: float | None
    best: float | None
    worst_client: str | None
    best_client: str | None
    virtual_s: float  # up to and with it: rounds and evaluations, weights fetched at the first
    moved_bytes: int  # the same
    secure_bytes: int  # of this one's sum, as in a round


class ClientAccount(_Model):
    """One client."""

    name: str
    group: str
    mode: str
    share: str
    cut: str
    r: int
    rounds: int  # in which its update counted
    slow_rounds: int  # in which it took over 1.5 times the median
    statuses: dict[str, int]
    reasons: list[str]
    codecs: list[str]
    first_loss: float | None
    last_loss: float | None
    virtual_s: float
    memory_bytes: int
    training: Costs
    evaluation: Costs


class Absence(_Model):
    """Why clients handed in nothing that counted, in training or evaluation."""

    status: str
    reason: str
    clients: list[str]
    times: int


class LineAccount(_Model):
    """Steps over shaped lines, a group of clients together: what they took, and what the model says."""

    group: str
    clients: int
    measured_s: float
    virtual_s: float


class FederationAccount(_Model):
    """The whole experiment."""

    name: str
    model: str
    fingerprint: str
    strategy: str
    secure: bool
    privacy: PrivacyAccount | None
    clients: list[ClientAccount]
    rounds: list[RoundAccount]
    evaluations: list[Evaluation]
    headline: Headline | None
    exported: Exported | None
    absences: list[Absence]
    changes: list[str]  # of the scenario, at a resume
    lines: list[LineAccount]  # empty unless the lines were shaped
    total: Costs
    virtual_s: float
    target_loss: float | None
    reached_target: Evaluation | None
    alternatives: list[Alternative]
    prices: Prices  # the newest
    price_sources: dict[str, str]  # by field of `prices`: the cloud's list, your own table, or assumed
