"""The shape of `costs.json`, version `tightbeam.costs/1`; docs/costs.md explains every field.

Additions keep the version; a field that changes its meaning or goes away makes a new one.
"""

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from tightbeam.common.accounts.prices import Bill, Energy, Prices
from tightbeam.common.accounts.rows import StepBytes

__all__ = [
    "KINDS",
    "SCHEMA",
    "BillLine",
    "Costs",
    "Edge",
    "ModeCost",
    "Prediction",
    "Scope",
    "Seconds",
    "TimeBin",
    "Total",
]

SCHEMA: Final = "tightbeam.costs/1"

KINDS: Final = ("forward", "backward", "evaluation", "fill", "weights", "control")
"""What bytes were for. The first four are steps: training's, an evaluation's, and what filled a cache."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)


class Seconds(_Model):
    """Where an edge's time went. `edge_compute` to `other` add up to `wall`, the training steps' time."""

    wall: float
    edge_compute: float
    codec: float
    seal: float
    network: float
    cloud_queue: float
    cloud_compute: float
    other: float
    evaluation: float
    """Waiting for the trunk in evaluations, which is not part of `wall`. Of a step that was on its way while
    the edge computed, here and above only the seconds count in which the edge stood waiting for it."""


class TimeBin(_Model):
    """Wire bytes of steps in one slice of an edge's time."""

    start_s: float
    """Since the first row of all runs in the report; all edges share the slices."""
    seconds: float
    forward_up_bytes: int = 0
    forward_down_bytes: int = 0
    backward_up_bytes: int = 0
    backward_down_bytes: int = 0


class Prediction(_Model):
    """Payload bytes that the formula of the mode says, beside those that crossed."""

    bytes_per_training_token: float
    bytes_per_evaluation_token: float
    predicted_payload_bytes: int
    measured_payload_bytes: int


class BillLine(_Model):
    """One price on what some part of the runs used."""

    part: str
    """"training", "evaluation", "download" or "electricity"; what fills a cache counts as training."""
    unit: str
    """"bytes" on the wire, "flops" of the cloud, or "joules" at the edge."""
    used: float
    rate: float
    """Per gigabyte, petaflop or kilowatt-hour."""
    currency: str
    source: str
    """Whose price that is: "your price table", "the cloud's price list" or "assumed"."""
    money: float


class Scope(_Model):
    """What one part of the runs used of the cloud, all edges together."""

    wire_bytes: int
    cloud_flops: int
    money: float


class Edge(_Model):
    """One edge: one run folder."""

    name: str
    runs: list[str]
    model: str
    fingerprint: str
    cut: str
    mode: str
    dtype: str
    codecs: dict[str, str]
    hidden_size: int | None
    device: str
    cloud_device: str = ""
    """Kind that the cloud says it computes on; empty where it did not say."""
    platform: str
    weight_bytes: int | None = None
    """Of the blocks of this cut, as the cloud sends them; None where the ledger does not say."""
    model_bytes: int | None = None
    """Of all blocks."""
    optimizer_steps: int
    step_counts: dict[str, int]
    """Billed steps by kind: forward, backward, evaluation; fill, if there was any."""
    retried_steps: int
    training_tokens: int
    """That crossed in training steps; in a mode that caches fewer than were trained on."""
    evaluation_tokens: int
    """That crossed in evaluations."""
    fill_tokens: int = 0
    """That crossed once for a cache, of training and evaluation data."""
    shared_tokens: int = 0
    """Of all these, tokens that did not cross themselves: their rows are those of another sequence's."""
    trained_tokens: int = 0
    """In the batches of all optimizer steps, whether they crossed or came from a cache."""
    evaluated_tokens: int = 0
    sequences: int
    """Segments whose activations the cloud saw, each pass counted."""
    traffic: dict[str, StepBytes]
    """By kind, see `KINDS`; transfers beside the steps have wire bytes only."""
    resent_bytes: int
    """Wire bytes of failed attempts and of steps executed again; not billed."""
    disputed_bytes: int = 0
    """Wire bytes by receipts of the cloud that this edge's own count contradicts; in no other figure."""
    edge_flops: int
    cloud_flops: dict[str, int]
    """Billed operations by kind of step."""
    seconds: Seconds
    cloud_compute_s: float
    """What the cloud computed for this edge, evaluations included."""
    peak_memory_bytes: int
    train_loss: list[tuple[int, float]]
    """(optimizer step, nats per learned token)."""
    eval_loss: list[tuple[int, float]]
    timeline: list[TimeBin]
    prediction: Prediction | None
    """None when the ledger does not say the model's hidden size."""
    energy: Energy
    bill: list[BillLine]

    @property
    def crossed_tokens(self) -> int:
        """Rows that crossed, each pass counted."""
        return self.training_tokens + self.evaluation_tokens + self.fill_tokens - self.shared_tokens


class Total(_Model):
    """Sums over the edges."""

    training_tokens: int
    evaluation_tokens: int
    fill_tokens: int = 0
    bytes: StepBytes
    """Steps and other transfers."""
    step_payload_bytes: int
    step_wire_bytes: int
    resent_bytes: int
    edge_flops: int
    cloud_flops: int
    wall_s: float
    """Of the edge that took longest."""
    edge_s: float
    """All edges together, evaluations included."""
    cloud_compute_s: float
    energy: Energy
    bill: Bill
    training: Scope
    evaluation: Scope
    download: Scope
    """Weights and tokenizer, fetched once and kept for later runs; no operations."""


class ModeCost(_Model):
    """What the same job costs in one mode."""

    edges: list[str] = Field(default_factory=list)
    """Whose job it is: edges that ran in the same mode."""
    mode: str
    measured: bool
    payload_bytes: int
    cloud_flops: int
    cloud_bill: float
    """Traffic of steps and cloud compute, in the currency of `prices`; no download and no electricity."""
    download_bytes: int | None = None
    """Of the weights that stay at the edge in this mode; None where the ledger does not say."""
    rule: str
    """The formula in words, with its assumptions."""
    cloud_sees: str = ""
    """Of the data, in words."""


class Costs(_Model):
    """What one experiment cost."""

    schema_: Literal["tightbeam.costs/1"] = Field(default=SCHEMA, alias="schema")
    edges: list[Edge]
    total: Total
    modes: list[ModeCost]
    bill: list[BillLine] = Field(default_factory=list)
    """Of all edges together; `total.bill` is its sum."""
    prices: Prices
    """Of the newest start."""
    price_sources: dict[str, str] = Field(default_factory=dict)
    """By field of `prices`, as `source` of a line of the bill."""

    def to_json(self) -> str:
        """Text of `costs.json`."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Costs":
        """Inverse of `to_json`; another schema version is refused by the model."""
        return cls.model_validate_json(text)
