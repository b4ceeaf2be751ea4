"""A simulated experiment as data: one YAML file, checked before anything starts.

    backbone, data, partition     what is trained on what, and who has it
    clients, rounds, sample       how many, how often, how many of them each time
    client, groups                what every client has, and what some of them have instead
    adapter, train, strategy      what a client does in a round, and what becomes of it
    faults, cloud, output         what goes wrong, where the trunk is, where the results go

`docs/federation.md` lists every key. Nothing heavy is imported here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tightbeam.common.settings.sections import Section, checked_section
from tightbeam.common.settings.yaml_text import read_mapping
from tightbeam.edge.recipe import Address, Codecs, CutText, SideSection
from tightbeam.federation.profiles import DEVICES, NETWORKS, Budget, DeviceProfile, NetworkProfile

__all__ = [
    "FLOWER_STRATEGIES",
    "SECURE_STRATEGIES",
    "AdapterSection",
    "ClientProfile",
    "ClientSection",
    "CloudSection",
    "DataSection",
    "FaultsSection",
    "GroupSection",
    "OutputSection",
    "PartitionSection",
    "PrivacySection",
    "Scenario",
    "StrategySection",
    "TrainSection",
    "load_scenario",
    "scenario_from_mapping",
]

FLOWER_STRATEGIES = ("fedavgm", "fedadam", "fedyogi", "fedmedian", "krum")
SECURE_STRATEGIES = ("fedit", "ffa", "fedavgm", "fedadam", "fedyogi")  # linear in the updates, up to the mean
_ONE_SHAPE = ("fedit", *FLOWER_STRATEGIES)  # need the same rank everywhere
_BY_LAYER = ("fedit", "ffa", "flexlora", "hetlora", "zeropad")  # a layer may come and go between rounds


def _named(table: Mapping[str, Section], what: str) -> BeforeValidator:
    """Let a profile be given by its name."""

    def look_up(value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in table:
            raise ValueError(f"no {what} is called {value!r}; known are {', '.join(table)}")
        return table[value].model_dump()

    return BeforeValidator(look_up)


Network = Annotated[NetworkProfile, _named(NETWORKS, "network")]
Device = Annotated[DeviceProfile, _named(DEVICES, "device")]
Mode = Literal["ushape", "top", "side"]
Share = Literal["all", "top", "none"]


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
    batch_size: int = Field(default=4, ge=1, description="Examples per step.")
    lr: float = Field(default=1e-3, gt=0, description="Learning rate, constant.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="Without weight decay.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Longest gradient, L2; 0 does not clip.")
    proximal: float = Field(
        default=0.0, ge=0, description="FedProx: mu of mu/2 ||adapter - global adapter||^2."
    )
    freeze_bottom_after: int | None = Field(
        default=None, ge=1, description="Rounds after which nobody trains below its cut any more."
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


class ClientSection(Section):
    """What every client has."""

    mode: Mode = Field(default="ushape", description="How training uses the trunk: see docs/modes.md.")
    side: SideSection = Field(default_factory=SideSection, description="The side network of mode side.")
    share: Share = Field(
        default="all", description="What is federated; the rest is the client's own (personal mode)."
    )
    cache_gb: float = Field(
        default=5.0, ge=0, description="Most of what crosses once to keep, 10^9 bytes; 0 keeps nothing."
    )
    cut: CutText = Field(default="4:4", description="k:m, blocks at the edge.")
    codec: Codecs = Field(default_factory=Codecs, description="How tensors become bytes.")
    r: int = Field(default=8, ge=1, description="Rank of the adapter.")
    network: Network = Field(default=NETWORKS["home"], description="Name or numbers.")
    device: Device = Field(default=DEVICES["laptop"], description="Name or numbers.")
    budget: Budget = Field(default_factory=Budget, description="Most to spend; no limit if left out.")

    @property
    def place(self) -> tuple[object, ...]:
        """What decides which parameters it shares, and their shapes up to the rank."""
        return self.cut, self.mode, self.share, self.side.model_dump_json() if self.mode == "side" else ""

    @property
    def shared_blocks(self) -> int:
        """How many blocks have an adapter that it shares."""
        return self.blocks_shared_in(self.mode)

    def blocks_shared_in(self, mode: str) -> int:
        """The same, had it trained in another mode."""
        bottom, top = map(int, self.cut.split(":"))
        bare = mode == "top" or (mode == "side" and not self.side.adapt_bottom)
        if self.share == "none":
            return 0
        return top if bare or self.share == "top" else bottom + top


class GroupSection(Section):
    """So many clients that have something else than `client` says; groups take clients in order."""

    clients: int = Field(ge=1, description="How many.")
    mode: Mode | None = None
    side: SideSection | None = None
    share: Share | None = None
    cache_gb: float | None = Field(default=None, ge=0)
    cut: CutText | None = None
    codec: Codecs | None = None
    r: int | None = Field(default=None, ge=1)
    network: Network | None = None
    device: Device | None = None
    budget: Budget | None = None


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


@dataclass(frozen=True, slots=True)
class ClientProfile:
    """One client, with its group's values in place."""

    number: int
    name: str
    group: str
    options: ClientSection


class Scenario(Section):
    """One simulated experiment, complete and checked."""

    backbone: str = Field(default="demo", description="Folder, hub id, or demo: SmolLM2-135M from PyPI.")
    clients: int = Field(ge=1, description="How many there are.")
    rounds: int = Field(ge=1, description="How often adapters are exchanged.")
    sample: int | None = Field(default=None, ge=1, description="Clients per round; all if left out.")
    wait_for: int | None = Field(
        default=None,
        ge=1,
        description="Clients to wait for before the first round; others join as they come.",
    )
    eval_sample: int | None = Field(
        default=None, ge=1, description="Clients per evaluation, the same each time; as sample if left out."
    )
    eval_every: int = Field(default=0, ge=0, description="Rounds between evaluations; 0: start and end.")
    target_loss: float | None = Field(
        default=None, gt=0, description="Mean held-out loss whose first reaching is reported, nats."
    )
    seed: int = Field(default=0, ge=0, description="Of everything that is drawn.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch at the edges.")
    data: DataSection = Field(default_factory=DataSection)
    partition: PartitionSection = Field(default_factory=PartitionSection)
    client: ClientSection = Field(default_factory=ClientSection)
    groups: dict[str, GroupSection] = Field(default_factory=dict)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    train: TrainSection = Field(default_factory=TrainSection)
    strategy: StrategySection = Field(default_factory=StrategySection)
    faults: FaultsSection = Field(default_factory=FaultsSection)
    cloud: CloudSection = Field(default_factory=CloudSection)
    output: OutputSection = Field(default_factory=OutputSection)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for problem in (self._counts(), self._shapes(), self._privacy(), self._modes()):
            if problem:
                raise ValueError(problem)
        return self

    def _counts(self) -> str:
        if self.sample is not None and self.sample > self.clients:
            return f"sample is {self.sample}, but there are {self.clients} clients"
        if self.eval_sample is not None and self.eval_sample > self.clients:
            return f"eval_sample is {self.eval_sample}, but there are {self.clients} clients"
        if self.wait_for is not None and self.wait_for > self.clients:
            return f"wait_for is {self.wait_for}, but there are {self.clients} clients"
        grouped = sum(group.clients for group in self.groups.values())
        if grouped > self.clients:
            return f"the groups have {grouped} clients, but there are {self.clients}"
        if self.strategy.name == "krum" and self.sampled < 2 * self.strategy.num_malicious + 3:
            return "krum needs at least 2 * num_malicious + 3 clients per round"
        return ""

    def _shapes(self) -> str:
        profiles, name = self.profiles(), self.strategy.name
        ranks = {profile.options.r for profile in profiles}
        places = {profile.options.place for profile in profiles}
        hidden = self.strategy.secure or self.strategy.privacy is not None
        if (name in _ONE_SHAPE or hidden) and len(ranks) > 1:
            return f"{name} needs one rank, not {sorted(ranks)}: use flexlora, flora, hetlora or zeropad"
        if (name in FLOWER_STRATEGIES or hidden) and len(places) > 1:
            what = f"strategy.{'secure' if self.strategy.secure else 'privacy'}" if hidden else name
            return f"{what} needs one cut, mode and share for all clients: use fedit or flexlora in the open"
        return ""

    def _modes(self) -> str:
        """What folds, hides or remembers whole adapters cannot do with a part of them."""
        options, strategy = [profile.options for profile in self.profiles()], self.strategy
        sides, shares = {one.mode for one in options}, {one.share for one in options}
        freeze = self.train.freeze_bottom_after
        if self.folds and ("side" in sides or shares != {"all"} or freeze):
            return (
                f"{strategy.name}{' with mixed ranks' * (strategy.name == 'ffa')} folds what is learned into "
                "the blocks themselves, which mode side, client.share and train.freeze_bottom_after need as "
                "they are: use flexlora"
            )
        if shares == {"none"} and (strategy.name not in _BY_LAYER or strategy.secure or strategy.privacy):
            return "client.share none leaves nothing to combine: use fedit, without secure and privacy"
        if freeze and strategy.name not in _BY_LAYER:
            return (
                f"{strategy.name} goes by arrays that are the same in all rounds, and momentum would move a "
                f"bottom that train.freeze_bottom_after has frozen: use {', '.join(_BY_LAYER)}"
            )
        if freeze and freeze >= self.rounds:
            return f"train.freeze_bottom_after is {freeze}, but there are {self.rounds} rounds"
        return ""

    def _privacy(self) -> str:
        section, privacy = self.strategy, self.strategy.privacy
        if section.secure and section.name not in SECURE_STRATEGIES:
            return f"strategy.secure goes with {', '.join(SECURE_STRATEGIES)}: the others see single updates"
        if section.secure and any(profile.options.budget.degrade for profile in self.profiles()):
            return "strategy.secure goes without budget.degrade: the server says what a client has spent"
        if section.secure and section.max_weight > 2**20:
            return "strategy.secure hides weights of up to 1048576: lower strategy.max_weight"
        if privacy is None:
            return ""
        if section.name not in ("fedit", "ffa"):
            return "strategy.privacy goes with fedit and ffa"
        if section.weight != "equal":
            return "strategy.privacy needs weight: equal: else who has many examples moves the mean further"
        if section.secure and (privacy.where, privacy.clipping) != ("client", "fixed"):
            return (
                "strategy.secure with privacy needs where: client, clipping: fixed: nobody else sees updates"
            )
        most = self.sampled / 10  # Flower spends a part of the noise on the count of clipped clients
        if privacy.clipping == "adaptive" and privacy.noise_multiplier >= most:
            return f"adaptive clipping of {self.sampled} clients needs a noise_multiplier below {most:g}"
        return ""

    @property
    def folds(self) -> bool:
        """Whether clients add to their own weights what was learned and they do not wear."""
        mixed = len({profile.options.r for profile in self.profiles()}) > 1
        return self.strategy.name == "flora" or (self.strategy.name == "ffa" and mixed)

    @property
    def sampled(self) -> int:
        """Clients per round."""
        return self.sample or self.clients

    @property
    def evaluated(self) -> int:
        """Clients per evaluation."""
        return self.eval_sample or self.sampled

    def evaluated_after(self, number: int) -> bool:
        """Whether there is an evaluation after round `number`; 0 is before the first."""
        return number in (0, self.rounds) or (self.eval_every > 0 and number % self.eval_every == 0)

    @property
    def folder(self) -> Path:
        """`<output.dir>/<output.name>`."""
        return self.output.dir / self.output.name

    def profiles(self) -> list[ClientProfile]:
        """Every client with what it has."""
        owners = [name for name, group in self.groups.items() for _ in range(group.clients)]
        owners += [""] * (self.clients - len(owners))
        width = max(len(str(self.clients - 1)), 2)
        return [
            ClientProfile(number, f"client-{number:0{width}d}", owner, self._options(owner))
            for number, owner in enumerate(owners)
        ]

    def _options(self, owner: str) -> ClientSection:
        if not owner:
            return self.client
        group = self.groups[owner]
        values = {name: getattr(group, name) for name in ClientSection.model_fields}
        given = {name: value for name, value in values.items() if value is not None}
        return self.client.model_copy(update=given)

    def numbers(self) -> dict[str, Any]:
        """Give the part that decides the trained adapter; a resumed experiment must have the same."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        for key in ("cloud", "output", "threads", "target_loss"):
            del plain[key]
        return plain


def load_scenario(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario file and apply overrides such as `train.lr=1e-4`.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or a key or value is wrong, with its line.

    """
    mapping, lines = read_mapping(path, "scenario", "simulations/tightbeam/simulations/scenarios/")
    return scenario_from_mapping(mapping, overrides=overrides, origin=str(path), lines=lines)


def scenario_from_mapping(
    mapping: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    origin: str = "scenario",
    lines: Mapping[str, int] | None = None,
) -> Scenario:
    """Check plain data as a scenario; raises as `load_scenario`."""
    cure = "docs/federation.md lists every key."
    return checked_section(Scenario, mapping, overrides=overrides, origin=origin, lines=lines, cure=cure)
