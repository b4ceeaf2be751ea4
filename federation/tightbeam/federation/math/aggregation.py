"""How the adapters of many clients become one: six aggregators behind one small interface.

The ideal is the weighted mean of what the clients learned, `delta W* = sum_k p_k B_k A_k`, where p_k is a
client's share of all weights. Averaging the factors one by one is something else: (sum p B)(sum p A) has the
cross terms B_i A_j of clients that never met. So every `Aggregate` carries delta W* itself, as stacked
factors, and measures how far its adapter is from it, rather than claiming it.

    name      exact            mixed ranks   what it is
    fedit     no               no            mean of A, mean of B (arXiv 2305.05644)
    ffa       yes              nested A      A frozen and shared, mean of B (arXiv 2403.12313)
    flora     yes              yes           factors stacked, folded into the weights (arXiv 2409.05976)
    flexlora  best of rank r   yes           singular value decomposition of delta W* (arXiv 2402.11505)
    hetlora   no               yes           padded with zeros, weighted by norm (arXiv 2401.06432)
    zeropad   no               yes           padded with zeros, then as fedit

docs/federation-math.md has the formulas and when to take which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tightbeam.common.errors import UpdateRefusedError
from tightbeam.federation.math.lora import LoraAdapter, LoraModule
from tightbeam.federation.math.lowrank import (
    best_rank,
    difference_norm,
    frobenius_norm,
    stack,
    weighted_mean,
)
from tightbeam.federation.math.updates import Cohort, Update, check_cohort

__all__ = [
    "AGGREGATORS",
    "Aggregate",
    "Aggregator",
    "FedIT",
    "FfaLora",
    "FlexLora",
    "Flora",
    "HetLora",
    "ZeroPadding",
    "aggregator_named",
    "self_pruned_rank",
]


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """The new global adapter, the exact mean that it stands for, and what to tell about it."""

    adapter: LoraAdapter
    mean: LoraAdapter  # delta W*, exactly: the stacked factors
    notes: tuple[str, ...]
    folds: bool = False  # clients add it to their own weights and start with a fresh adapter

    def relative_error(self, rank: int | None = None) -> float:
        """`||delta W - delta W*|| / ||delta W*||` (Frobenius, all layers) for a client that gets `rank`."""
        held = self.adapter if rank is None else self.adapter.resized(min(rank, self.adapter.rank))
        norm = float(np.sqrt(sum(frobenius_norm(module) ** 2 for module in self.mean.modules.values())))
        error = difference_norm(held, self.mean)
        return error / norm if norm else float(np.inf if error else 0.0)

    def state(self, scale: float, rank: int | None = None, seed: int = 0) -> dict[str, NDArray[np.float32]]:
        """What a client of this scale and rank gets, under PEFT's names; no rank: all of it.

        A client of a smaller rank gets the first directions, one of a larger rank gets fresh ones with the
        same delta W (see `LoraModule.resized`).
        """
        adapter = self.adapter if rank is None else self.adapter.resized(rank, seed)
        return adapter.state(scale)


class Aggregator(Protocol):
    """Combines updates; holds no state between rounds."""

    def aggregate(self, updates: Sequence[Update]) -> Aggregate:
        """Combine one round's updates; the order of the clients does not matter beyond rounding.

        Raises:
            CohortError: there are none.
            UpdateRefusedError: one cannot be used; the message names the client and the tensor.

        """
        ...  # a Protocol's body


class FedIT:
    """Weighted mean of A and of B. Biased after several local steps; all ranks must be equal.

    It is exact only while all clients share one of the factors: in a round in which B starts at zero and
    every client takes one step of plain SGD, A does not move.
    """

    def aggregate(self, updates: Sequence[Update]) -> Aggregate:
        """See `Aggregator`; refuses mixed ranks."""
        cohort = check_cohort(updates)
        first = cohort.adapters[0].modules
        for client, adapter in zip(cohort.clients, cohort.adapters, strict=True):
            for layer, module in adapter.modules.items():
                if module.rank != first[layer].rank:
                    raise UpdateRefusedError(
                        f"The update of {client} is refused: {module.names[0]} has rank {module.rank}, "
                        f"not {first[layer].rank} as that of {cohort.clients[0]}.",
                        cure="For mixed ranks use flora or flexlora.",
                    )
        return _by_layer(cohort, _mean_of_factors, "biased: mean(B) @ mean(A) is not the mean of B @ A")


class ZeroPadding:
    """FedIT after padding the smaller ranks with zeros: as biased, and it shrinks what few clients have."""

    def aggregate(self, updates: Sequence[Update]) -> Aggregate:
        """See `Aggregator`."""
        return _by_layer(check_cohort(updates), _mean_of_factors, "biased: zero-padded factors averaged")


class HetLora:
    """Zero-padding, each layer weighted by the norm of what a client learned in it, not by its examples."""

    def aggregate(self, updates: Sequence[Update]) -> Aggregate:
        """See `Aggregator`. A layer in which nobody learned anything falls back to the clients' weights."""
        return _by_layer(check_cohort(updates), _mean_by_norm, "biased: zero-padded, weighted by ||B A||")


class FfaLora:
    """A is frozen and the same for all, only B is trained: the mean of B is the exact mean.

    Mixed ranks stay exact if each client's A is the first rows of the widest one. A client that then gets
    fewer directions than the aggregate has loses the others: `relative_error(rank)` says how much.
    """

    def aggregate(self, updates: Sequence[Update]) -> Aggregate:
        """See `Aggregator`; refuses a client whose A moved."""
        cohort = check_cohort(updates)
        for layer in cohort.adapters[0].modules:
            modules = [adapter.modules[layer] for adapter in cohort.adapters]
            shared = max(modules, key=lambda module: module.rank).A_RI
            for client, module in zip(cohort.clients, modules, strict=True):
                if not np.array_equal(module.A_RI, shared[: module.rank]):
                    raise UpdateRefusedError(
                        f"The update of {client} is refused: {module.names[0]} is not the shared, frozen A.",
                        cure="Train lora_B only, or use flora or flexlora.",
                    )
        return _by_layer(cohort, _mean_under_shared_A, "exact: A is frozen")


class Flora:
    """Stacked factors: exact for any ranks, and the rank is the sum of the clients'.

    The stack is not trained on. Each edge folds it into its own copies of its blocks (`lora.fold`) and goes
    on with `adapter.restarted(rank)`, or with the `folding.principal` directions of all that was learned.
    """

    def aggregate(self, updates: Sequence[Update]) -> Aggregate:
        """See `Aggregator`; `folds` is set."""
        mean = _exact_mean(check_cohort(updates))
        note = f"exact: rank {mean.rank}, to be folded into the edges' own weights"
        return Aggregate(mean, mean, (note, *_notes(mean)), folds=True)


class FlexLora:
    """The best approximation of the exact mean within a rank: by default the largest that a client has."""

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank

    def aggregate(self, updates: Sequence[Update]) -> Aggregate:
        """See `Aggregator`."""
        cohort = check_cohort(updates)
        mean = _exact_mean(cohort)
        rank = self.rank or max(adapter.rank for adapter in cohort.adapters)
        modules = {layer: best_rank(module, rank) for layer, module in mean.modules.items()}
        adapter = LoraAdapter(modules, mean.rest).resized(rank)
        note = f"the best rank {rank} of a mean of rank {mean.rank}"
        return Aggregate(adapter, mean, (note, *_notes(mean)))


AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
    "fedit": FedIT,
    "ffa": FfaLora,
    "flexlora": FlexLora,
    "flora": Flora,
    "hetlora": HetLora,
    "zeropad": ZeroPadding,
}


def aggregator_named(name: str) -> Aggregator:
    """Return the aggregator of this name; the keys of `AGGREGATORS` are the names."""
    return AGGREGATORS[name]()


def self_pruned_rank(before: LoraAdapter, after: LoraAdapter, keep: float = 0.99) -> int:
    """HetLoRA's self-pruning: the rank with which a client goes on after its local steps.

    The tail are the directions beyond `keep * rank`. If the product of its norms, ||B_tail|| ||A_tail||
    summed over layers, fell during the local steps, the data do not ask for it and it is cut.
    """
    rank = after.rank
    kept = max(1, int(keep * rank))

    def tail(adapter: LoraAdapter) -> float:
        return sum(
            float(np.linalg.norm(module.B_OR[:, kept:]) * np.linalg.norm(module.A_RI[kept:]))
            for module in adapter.modules.values()
        )

    return kept if tail(after) < tail(before) else rank


_Combine = Callable[[Sequence[LoraModule], Sequence[float]], LoraModule]


def _by_layer(cohort: Cohort, combine: _Combine, note: str) -> Aggregate:
    mean = _exact_mean(cohort)
    modules = {
        layer: combine([adapter.modules[layer] for adapter in cohort.adapters], cohort.shares)
        for layer in mean.modules
    }
    return Aggregate(LoraAdapter(modules, mean.rest), mean, (note, *_notes(mean)))


def _exact_mean(cohort: Cohort) -> LoraAdapter:
    """Delta W* as stacked factors, and the mean of the rest."""
    first, shares = cohort.adapters[0], cohort.shares
    modules = {
        layer: stack([adapter.modules[layer] for adapter in cohort.adapters], shares)
        for layer in first.modules
    }
    rest = {
        name: weighted_mean([adapter.rest[name] for adapter in cohort.adapters], shares)
        for name in first.rest
    }
    return LoraAdapter(modules, rest)


def _mean_of_factors(modules: Sequence[LoraModule], shares: Sequence[float]) -> LoraModule:
    """Average A and B one by one, smaller ranks padded with zeros to the largest."""
    rank = max(module.rank for module in modules)
    padded = [module.padded(rank) for module in modules]
    A_RI = weighted_mean([module.A_RI for module in padded], shares)
    return modules[0].with_factors(A_RI, weighted_mean([module.B_OR for module in padded], shares))


def _mean_by_norm(modules: Sequence[LoraModule], shares: Sequence[float]) -> LoraModule:
    norms = [frobenius_norm(module) for module in modules]
    total = sum(norms)
    return _mean_of_factors(modules, [norm / total for norm in norms] if total else shares)


def _mean_under_shared_A(modules: Sequence[LoraModule], shares: Sequence[float]) -> LoraModule:  # noqa: N802
    shared = max(modules, key=lambda module: module.rank)
    return shared.with_factors(shared.A_RI, _mean_of_factors(modules, shares).B_OR)


def _notes(mean: LoraAdapter) -> tuple[str, ...]:
    """What a reader of the result must know about tensors that are no factors."""
    if any("lora_magnitude_vector" in name for name in mean.rest):
        return ("DoRA: magnitudes are averaged, so exactness holds for B @ A, not for the weights",)
    return ()
