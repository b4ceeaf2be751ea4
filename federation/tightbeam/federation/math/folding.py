"""Adapters of which each client wears the first directions and folds the others into its own weights.

So a client of any rank starts a round from all that was learned, W + beyond(rank) + what it wears, and what
it did not train is in the mean as it was: `kept`. Under FFA, whose A is one for all, that is a sum of B alone
(`on_shared_A`). FLoRA goes on from the best directions instead of from zero, and stays exact:

    start = principal(nothing)          every direction of delta W, the largest singular value first
    client k wears start.resized(r_k), folds beyond(start, r_k), trains, hands in B_k A_k
    delta W* = sum_k p_k (beyond(start, r_k) + B_k A_k) = kept(start, updates) + the aggregate of FLoRA
    start = principal(delta W*)         nothing is cut off: it turns the same sum into sorted directions
"""

from collections.abc import Sequence

import numpy as np

from tightbeam.federation.math.lora import LoraAdapter
from tightbeam.federation.math.lowrank import best_rank, stack
from tightbeam.federation.math.updates import Update

__all__ = ["beyond", "kept", "on_shared_A", "plus", "principal"]


def beyond(adapter: LoraAdapter, rank: int) -> LoraAdapter:
    """What a client of this rank folds: the directions after the first `rank`, up to the last with weight."""
    modules = {}
    for name, module in adapter.modules.items():
        weighty = np.flatnonzero(module.B_OR.any(axis=0))
        last = int(weighty[-1]) + 1 if len(weighty) else 0
        if last > rank:
            modules[name] = module.with_factors(module.A_RI[rank:last], module.B_OR[:, rank:last])
    return LoraAdapter(modules, {})


def kept(start: LoraAdapter, updates: Sequence[Update]) -> LoraAdapter:
    """Mean of what clients folded: each direction of `start` by the share of those who did not wear it."""
    total = sum(update.weight for update in updates)
    modules = {}
    for name, module in start.modules.items():
        shares_R = np.zeros(module.rank)
        for update in updates:
            shares_R[len(update.adapter[module.names[0]]) :] += update.weight / total
        modules[name] = module.with_factors(module.A_RI, module.B_OR * shares_R)
    return LoraAdapter(modules, {})


def on_shared_A(start: LoraAdapter, updates: Sequence[Update], mean: LoraAdapter) -> LoraAdapter:  # noqa: N802
    """FFA's next adapter: the clients' mean of B, and what was kept of the directions that some folded."""
    modules = {
        name: module.with_factors(module.A_RI, module.B_OR + mean.modules[name].padded(module.rank).B_OR)
        for name, module in kept(start, updates).modules.items()
    }
    return LoraAdapter(modules, mean.rest)


def plus(left: LoraAdapter, right: LoraAdapter) -> LoraAdapter:
    """Sum of both delta W, as stacked factors; a layer may be in one of them only."""
    joined = {
        name: stack([left.modules[name], module], [1.0, 1.0])
        for name, module in right.modules.items()
        if name in left.modules
    }
    return LoraAdapter({**left.modules, **right.modules, **joined}, {**left.rest, **right.rest})


def principal(adapter: LoraAdapter, rank: int, seed: int = 0) -> LoraAdapter:
    """The same delta W by its singular directions, the largest first; at least `rank` of them.

    Directions that delta W does not have are fresh: random rows of A with zero B.
    """
    sorted_ = {name: best_rank(module, min(module.shape)) for name, module in adapter.modules.items()}
    whole = LoraAdapter(sorted_, adapter.rest)
    wide = whole.resized(rank, seed)
    return LoraAdapter({n: m if m.rank > rank else wide.modules[n] for n, m in sorted_.items()}, adapter.rest)
