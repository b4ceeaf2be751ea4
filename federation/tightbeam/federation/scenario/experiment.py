"""A federated experiment as data: one YAML file, checked before anything starts.

    backbone, data, partition     what is trained on what, and who has it
    clients, rounds, sample       how many, how often, how many of them each time
    client, groups                what every client has, and what some of them have instead
    adapter, train, strategy      what a client does in a round, and what becomes of it
    faults, cloud, output         what goes wrong, where the trunk is, where the results go

`docs/federation.md` lists every key. Nothing heavy is imported here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from tightbeam.common.settings.sections import Section, checked_section
from tightbeam.common.settings.yaml_text import read_mapping
from tightbeam.edge.modes.registry import MODES
from tightbeam.federation.scenario.clients import ClientProfile, ClientSection, GroupSection
from tightbeam.federation.scenario.sections import (
    AdapterSection,
    CloudSection,
    DataSection,
    FaultsSection,
    OutputSection,
    PartitionSection,
    StrategySection,
    TrainSection,
)

__all__ = ["FLOWER_STRATEGIES", "SECURE_STRATEGIES", "Scenario", "load_scenario", "scenario_from_mapping"]

FLOWER_STRATEGIES = ("fedavgm", "fedadam", "fedyogi", "fedmedian", "krum")
SECURE_STRATEGIES = ("fedit", "ffa", "fedavgm", "fedadam", "fedyogi")  # linear in the updates, up to the mean
_ONE_SHAPE = ("fedit", *FLOWER_STRATEGIES)  # need the same rank everywhere
_BY_LAYER = ("fedit", "ffa", "flexlora", "hetlora", "zeropad")  # a layer may come and go between rounds


class Scenario(Section):
    """One federated experiment, complete and checked."""

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
        sides, shares = any(one.own_side for one in options), {one.share for one in options}
        freeze = self.train.freeze_bottom_after
        if self.folds and (sides or shares != {"all"} or freeze):
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
        if self.train.noise and not freeze and not any(MODES[one.mode].frozen_bottom for one in options):
            return "train.noise is for mode top, and for ushape with train.freeze_bottom_after"
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
