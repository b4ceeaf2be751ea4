"""A round's updates become the next global adapter: by our aggregators, or by a strategy of Flower's.

Clients with different cuts have different layers. So layers are combined in groups: those that the same
clients have go through the aggregator together, and a layer that nobody had in a round stays as it was. A
ladder of mode side is averaged among those who have one of its kind.

Flower's strategies see what their own FedAvg would: one record of arrays per client, all of one shape. After
a secure round they see one record, the mean, and do with it what they had done with that of the clients' own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedMedian, FedYogi, Krum, Strategy
from numpy.typing import NDArray

from tightbeam.federation.contract.messages import ADAPTIVE
from tightbeam.federation.contract.records import from_record, measurable, to_record
from tightbeam.federation.math import (
    Aggregate,
    Arrays,
    LoraAdapter,
    LoraModule,
    Update,
    aggregator_named,
    kept,
    on_shared_A,
    parse_adapter,
    plus,
    principal,
)
from tightbeam.federation.scenario import FLOWER_STRATEGIES, Scenario
from tightbeam.federation.server.global_adapter import GlobalAdapter, restricted
from tightbeam.federation.server.privacy import (
    Accounting,
    Adaptive,
    Chosen,
    adaptive_multiplier,
    private_strategy,
)

__all__ = [
    "Accepted",
    "ByAggregator",
    "ByFlower",
    "ByPrivateFlower",
    "Combined",
    "Combiner",
    "combiner_for",
    "trained_part",
]

Memory = dict[str, NDArray[np.floating[Any]]]
_REMEMBERED = ("momentum_vector", "m_t", "v_t")


@dataclass(frozen=True, slots=True, eq=False)
class Accepted:
    """One client's update that has passed the checks."""

    update: Update | None  # None: masked
    layers: frozenset[str]
    reply: Message


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """The next global adapter, and what to tell about it."""

    state: GlobalAdapter
    notes: tuple[str, ...] = ()
    relative_error: float | None = None  # of delta W, against the exact mean; None where it is not the aim


class Combiner(Protocol):
    """One way to combine."""

    reads_replies: bool  # else an update's arrays need not be kept a second time, in its reply

    def prepare(
        self, number: int, sent: ArrayRecord, num_chosen: int, grid: Grid, frozen: Collection[str] = ()
    ) -> ConfigRecord:
        """Hear what the chosen clients are sent; what they must be told. Nobody trains `frozen` layers."""
        ...  # a Protocol's body

    def combine(self, number: int, state: GlobalAdapter, accepted: Sequence[Accepted]) -> Combined:
        """Combine a round's updates, at least one."""
        ...  # a Protocol's body

    def after_mean(self, state: GlobalAdapter, number: int, mean: Arrays) -> Combined:
        """Go on from a secure round's mean: nobody knows more than that."""
        ...  # a Protocol's body

    def memory(self) -> Memory:
        """What must survive a restart."""
        ...  # a Protocol's body

    def remember(self, memory: Memory) -> None:
        """Inverse of `memory`."""


def combiner_for(scenario: Scenario, accounting: Accounting | None) -> Combiner:
    """What the scenario's strategy section asks for; `accounting` where it asks for privacy."""
    section = scenario.strategy
    if accounting is not None and not section.secure:
        return ByPrivateFlower(scenario, accounting)
    return ByFlower(scenario) if section.name in FLOWER_STRATEGIES else ByAggregator(scenario)


def trained_part(arrays: Arrays, scenario: Scenario, frozen: Collection[str] = ()) -> Arrays:
    """What clients hand in of what they were sent: without A in ffa, and without `frozen` layers."""
    only_B = scenario.strategy.name == "ffa"
    return {
        name: array
        for name, array in arrays.items()
        if name.partition(".lora_")[0] not in frozen and not (only_B and ".lora_A." in name)
    }


class ByAggregator:
    """Ours: `tightbeam.federation.math`."""

    reads_replies = False

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._aggregator = aggregator_named(scenario.strategy.name)
        self._rank = max(profile.options.r for profile in scenario.profiles())

    def prepare(
        self, number: int, sent: ArrayRecord, num_chosen: int, grid: Grid, frozen: Collection[str] = ()
    ) -> ConfigRecord:
        """Nothing: aggregators hold no state."""
        return ConfigRecord()

    def combine(self, number: int, state: GlobalAdapter, accepted: Sequence[Accepted]) -> Combined:
        """Combine group by group."""
        groups = [self._aggregate(layers, accepted) for layers in _groups(accepted)]
        if not groups:
            return Combined(state, ("nothing is shared",))
        modules = {name: m for group in groups for name, m in group.adapter.modules.items()}
        rest = {name: tensor for group in groups for name, tensor in group.adapter.rest.items()}
        means = {name: m for group in groups for name, m in group.mean.modules.items()}
        whole = Aggregate(LoraAdapter(modules, rest), LoraAdapter(means, {}), ())
        notes = tuple(dict.fromkeys(n for group in groups if group.mean.modules for n in group.notes))
        seed = self._scenario.seed + number
        if groups[0].folds and self._scenario.strategy.restart == "fresh":
            after = state.after_fold(whole.adapter, self._rank, seed)
        elif self._scenario.folds:
            after = state.after(self._all_learned(state, accepted, whole.adapter, seed))
        else:
            after = state.after(whole.adapter)
        return Combined(after, notes, whole.relative_error() if means else None)

    def after_mean(self, state: GlobalAdapter, number: int, mean: Arrays) -> Combined:
        """Take it."""
        return Combined(state.after(parse_adapter(mean, self._scenario.adapter.scale, "the sum")))

    def memory(self) -> Memory:
        """Nothing."""
        return {}

    def remember(self, memory: Memory) -> None:
        """Nothing."""

    def _all_learned(
        self, state: GlobalAdapter, accepted: Sequence[Accepted], mean: LoraAdapter, seed: int
    ) -> LoraAdapter:
        """Delta W of this round's layers after it, exactly: what clients trained, and what they folded."""
        learned: dict[str, LoraModule] = {}
        for layers in _groups(accepted):
            start, own = restricted(state.learned, layers), restricted(mean, layers)
            having = _having(layers, accepted)
            if self._scenario.strategy.name == "ffa":
                learned |= on_shared_A(start, having, own).modules
            else:
                learned |= principal(plus(kept(start, having), own), self._rank, seed).modules
        return LoraAdapter(learned, mean.rest)

    def _aggregate(self, layers: frozenset[str], accepted: Sequence[Accepted]) -> Aggregate:
        having = _having(layers, accepted)
        return self._aggregator.aggregate([_restricted(update, layers) for update in having])


class ByFlower:
    """Flower's own strategies, on adapters of one shape."""

    reads_replies = True

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._strategy = _flower_strategy(scenario)
        self._name = type(self._strategy).__name__

    def prepare(
        self, number: int, sent: ArrayRecord, num_chosen: int, grid: Grid, frozen: Collection[str] = ()
    ) -> ConfigRecord:
        """Let the strategy note the arrays that this round starts from; its messages are not used."""
        list(self._strategy.configure_train(number, sent, ConfigRecord(), grid))
        return ConfigRecord()

    def combine(self, number: int, state: GlobalAdapter, accepted: Sequence[Accepted]) -> Combined:
        """Hand Flower the clients' replies."""
        return self._combined(state, number, [one.reply for one in accepted])

    def after_mean(self, state: GlobalAdapter, number: int, mean: Arrays) -> Combined:
        """Hand Flower the mean as if there were one client."""
        content = RecordDict({"arrays": to_record(mean), "metrics": MetricRecord({"weight": 1})})
        return self._combined(state, number, [Message(content, 1, MessageType.TRAIN)])

    def _combined(
        self, state: GlobalAdapter, number: int, replies: list[Message], untrained: Arrays | None = None
    ) -> Combined:
        record, _ = self._strategy.aggregate_train(number, replies)
        assert record is not None, "there is at least one reply"
        arrays = from_record(record) | dict(untrained or {})
        adapter = parse_adapter(arrays, self._scenario.adapter.scale, "the aggregate")
        return Combined(state.after(adapter), (f"combined by Flower's {self._name}",))

    def memory(self) -> Memory:
        """Momenta, by their attribute's name and the array's."""
        found: Memory = {}
        for name in _REMEMBERED:
            value = getattr(self._strategy, name, None)
            items = value.items() if isinstance(value, Mapping) else enumerate(value or ())
            found |= {f"{name}/{key}": np.asarray(array) for key, array in items}
        return found

    def remember(self, memory: Memory) -> None:
        """Put momenta back."""
        for name in _REMEMBERED:
            own = {key.removeprefix(f"{name}/"): a for key, a in memory.items() if key.startswith(f"{name}/")}
            if own and name == "momentum_vector":
                setattr(self._strategy, name, [own[str(index)] for index in range(len(own))])
            elif own:
                setattr(self._strategy, name, own)


class ByPrivateFlower(ByFlower):
    """Flower's differential privacy around its own FedAvg; with ffa over B alone."""

    def __init__(self, scenario: Scenario, accounting: Accounting) -> None:
        self._scenario, self._accounting = scenario, accounting
        self._private = private_strategy(scenario, accounting)
        self._strategy = self._private
        self._name = type(self._private).__name__
        self._untrained: Arrays = {}
        self._trained = ArrayRecord()

    def prepare(
        self, number: int, sent: ArrayRecord, num_chosen: int, grid: Grid, frozen: Collection[str] = ()
    ) -> ConfigRecord:
        """Give the strategy the arrays to clip against; hand on the norm that it has for the clients."""
        arrays = from_record(sent)
        trained = trained_part(arrays, self._scenario, frozen)
        self._untrained = {name: array for name, array in arrays.items() if name not in trained}
        assert isinstance(self._private.strategy, Chosen)
        self._private.strategy.num_chosen = self._private.num_sampled_clients = num_chosen
        config = ConfigRecord({"server-round": number})
        self._trained = to_record(trained)
        list(self._private.configure_train(number, self._trained, config, grid))
        if isinstance(self._private, Adaptive):
            config[ADAPTIVE] = True
        return config

    def combine(self, number: int, state: GlobalAdapter, accepted: Sequence[Accepted]) -> Combined:
        """Hand Flower the replies, have it add its noise, and count the round."""
        # A mean over fewer clients moves further with each of them: the noise is for those who are there.
        self._private.num_sampled_clients = len(accepted)
        norm = self._private.clipping_norm
        for one in accepted:
            records = one.reply.content.array_records
            records["arrays"] = measurable(records["arrays"], self._trained)
        combined = self._combined(state, number, [one.reply for one in accepted], self._untrained)
        if isinstance(self._private, Adaptive):
            self._accounting.release(adaptive_multiplier(self._private, norm))
        return combined

    def memory(self) -> Memory:
        """The norm, which changes where clipping is adaptive."""
        return {"clipping_norm": np.array(self._private.clipping_norm)}

    def remember(self, memory: Memory) -> None:
        """Put the norm back."""
        self._private.clipping_norm = float(memory["clipping_norm"])


def _flower_strategy(scenario: Scenario) -> Strategy:
    section = scenario.strategy
    common: dict[str, Any] = {
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
        "weighted_by_key": "weight",
    }
    if section.name == "fedavgm":
        return FedAvgM(**common, server_learning_rate=section.server_lr, server_momentum=section.momentum)
    if section.name == "fedmedian":
        return FedMedian(**common)
    if section.name == "krum":
        return Krum(**common, num_malicious_nodes=section.num_malicious)
    kind = FedAdam if section.name == "fedadam" else FedYogi
    return kind(**common, eta=section.server_lr, beta_1=section.momentum)


def _groups(accepted: Sequence[Accepted]) -> list[frozenset[str]]:
    """Layers that the same clients have, in a fixed order."""
    owners: dict[str, tuple[int, ...]] = {}
    for number, one in enumerate(accepted):
        for layer in one.layers:
            owners[layer] = (*owners.get(layer, ()), number)
    groups: dict[tuple[int, ...], set[str]] = {}
    for layer, clients in owners.items():
        groups.setdefault(clients, set()).add(layer)
    return [frozenset(groups[clients]) for clients in sorted(groups)]


def _having(layers: frozenset[str], accepted: Sequence[Accepted]) -> list[Update]:
    """Updates of the clients that have all of these layers."""
    return [one.update for one in accepted if one.update and layers <= one.layers]


def _restricted(update: Update, layers: frozenset[str]) -> Update:
    kept = {name: array for name, array in update.adapter.items() if name.split(".lora_")[0] in layers}
    return Update(update.client, update.weight, kept, update.scale)
