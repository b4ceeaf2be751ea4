"""Sections of a scenario that hold for all its clients: data, training, strategy, faults, cloud, output."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from tightbeam.common.settings.sections import Section
from tightbeam.edge.recipe import Address

__all__ = [
    "AdapterSection",
    "CloudSection",
    "DataSection",
    "FaultsSection",
    "OutputSection",
    "PartitionSection",
    "PrivacySection",
    "StrategySection",
    "TrainSection",
]


class DataSection(Section):
    """All examples of all clients, before they are dealt out."""

    source: str = Field(
        default="demo", description="A JSONL or CSV file, or demo: chats on 21 topics from PyPI."
    )
    format: Literal["auto", "messages", "prompt", "instruction", "text"] = Field(
        default="auto", description="Shape of a record; auto tells it by the keys of the first one."
    )
    max_length: int = Field(default=256, ge=2, description="Longest example, tokens.")
    answer_only: bool = Field(default=True, description="Learn the answer's tokens only.")
    eval_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Share of each client's examples that is held out."
    )
    max_examples: int | None = Field(
        default=None, ge=2, description="Use so many rows only, drawn by the seed."
    )


class PartitionSection(Section):
    """Who has which examples."""

    by: Literal["iid", "dirichlet", "field", "size"] = Field(default="iid", description="How to deal.")
    field: str = Field(default="topic", description="Key of a row that dirichlet and field go by.")
    alpha: float = Field(default=0.5, gt=0, description="Of the Dirichlet draw; small means unlike clients.")
    skew: float = Field(default=1.0, ge=0, description="Exponent of by size; 0 gives equal sizes.")
    min_examples: int = Field(default=2, ge=2, description="Fewest examples of a client.")


class AdapterSection(Section):
    """The LoRA that is federated; its rank is the client's."""

    scale: float = Field(default=2.0, gt=0, description="alpha / r, the same for every rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of adapter inputs dropped, 0 to 1.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="Layers that get an adapter, as in a recipe."
    )


class TrainSection(Section):
    """What a client does in one round. Optimizers start afresh each round."""

    steps: int = Field(default=4, ge=1, description="Optimizer steps per round.")
    batch_size: int = Field(default=4, ge=1, description="Examples per micro-batch.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Micro-batches per optimizer step.")
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps from rate 0 to lr.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="constant",
        description="How the rate goes on after warm-up: constant, or to 0 at the last step of all rounds.",
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="Without weight decay.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Longest gradient, L2; 0 does not clip.")
    proximal: float = Field(
        default=0.0, ge=0, description="FedProx: mu of mu/2 ||adapter - global adapter||^2."
    )
    freeze_bottom_after: int | None = Field(
        default=None, ge=1, description="Rounds after which nobody trains below its cut any more."
    )
    noise: float = Field(
        default=0.0, ge=0, description="Gaussian noise on what a frozen trunk gave, as in a recipe."
    )


class PrivacySection(Section):
    """Differential privacy of whole clients, by Flower's strategies, mods and accountant."""

    noise_multiplier: float = Field(gt=0, description="Noise over clipping norm.")
    clipping_norm: float = Field(
        gt=0, description="Longest update of a client, L2; of the first round if adaptive."
    )
    where: Literal["server", "client"] = Field(
        default="server",
        description="Who clips. In secure runs the client, and it adds its part of the noise.",
    )
    clipping: Literal["fixed", "adaptive"] = Field(
        default="fixed", description="adaptive: the norm follows a quantile of the updates' lengths."
    )
    quantile: float = Field(default=0.5, ge=0, le=1, description="Share of updates to clip, if adaptive.")
    delta: float = Field(default=1e-5, gt=0, lt=1, description="Delta of (epsilon, delta).")


class StrategySection(Section):
    """What becomes of the clients' adapters."""

    name: Literal[
        "fedit", "ffa", "flora", "flexlora", "hetlora", "zeropad",
        "fedavgm", "fedadam", "fedyogi", "fedmedian", "krum",
    ] = Field(default="fedit", description="See docs/federation-math.md.")  # fmt: skip
    weight: Literal["examples", "tokens", "equal"] = Field(
        default="examples",
        description="What a client counts by: its examples, the tokens it learned in the round, or as any.",
    )
    max_weight: int = Field(
        default=2**20, ge=1, description="Most that one client may count by, in that unit."
    )
    restart: Literal["principal", "fresh"] = Field(
        default="principal",
        description="flora: clients go on from the largest directions of what was learned, or from zero.",
    )
    server_lr: float = Field(default=1.0, gt=0, description="fedavgm, fedadam, fedyogi.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="fedavgm; beta_1 of fedadam, fedyogi.")
    num_malicious: int = Field(default=0, ge=0, description="krum: clients that may lie.")
    secure: bool = Field(default=False, description="The server sees the sum only, see docs/federation.md.")
    threshold: float = Field(
        default=2 / 3, gt=0.5, le=1, description="Share of a secure round's clients that a sum takes."
    )
    min_cohort: int = Field(default=3, ge=3, description="Fewest clients in a secure sum.")
    privacy: PrivacySection | None = Field(
        default=None, description="Differential privacy; none if left out."
    )


class FaultsSection(Section):
    """What goes wrong on purpose, by the seed."""

    dropout: float = Field(default=0.0, ge=0, le=1, description="Chance that a sampled client vanishes.")
    straggler: float = Field(default=0.0, ge=0, le=1, description="Chance that a client is slow in a round.")
    slowdown: float = Field(default=5.0, ge=1, description="How many times slower a straggler is.")
    deadline_s: float | None = Field(
        default=None, gt=0, description="Virtual seconds of a round; later updates are left out."
    )


class CloudSection(Section):
    """Where the trunk is."""

    address: Address | None = Field(default=None, description="host:port; one is started if left out.")
    identities: Path | None = Field(
        default=None, description="Folder of `tightbeam certs init` with one identity per client name."
    )
    insecure: bool = Field(default=False, description="Connect without TLS; only for loopback.")
    projection_text: Path | None = Field(
        default=None, description="Public text that a started cloud fits its taps to; else Python's manual."
    )
    gflops: float = Field(
        default=20_000, gt=0, description="Speed that virtual time gives the cloud, 1e9 operations a second."
    )


class OutputSection(Section):
    """Where the results go: `<dir>/<name>/`."""

    dir: Path = Field(default=Path("runs"), description="Folder of runs.")
    name: str = Field(
        default="federation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of this experiment."
    )
