"""Random LoRA states under PEFT's names, for the federation's tests."""

import numpy as np
from numpy.typing import NDArray

from tightbeam.federation.math import Update

LAYERS = {
    "base_model.model.model.layers.0.self_attn.q_proj": (24, 32),
    "base_model.model.model.layers.0.mlp.down_proj": (32, 40),
}
HEAD = "base_model.model.lm_head.bias"

State = dict[str, NDArray[np.float32]]


def random_state(rank: int, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    state: State = {HEAD: rng.normal(size=7).astype(np.float32)}
    for layer, (num_out, num_in) in LAYERS.items():
        state[f"{layer}.lora_A.weight"] = rng.normal(size=(rank, num_in)).astype(np.float32)
        state[f"{layer}.lora_B.weight"] = rng.normal(size=(num_out, rank)).astype(np.float32)
    return state


def random_updates(ranks: list[int], alpha: float = 16.0) -> list[Update]:
    """Clients with weights 1, 2, 3, ... and PEFT's own scale alpha / r, so mixed ranks mean mixed scales."""
    return [
        Update(f"client-{number}", float(number + 1), random_state(rank, seed=number), alpha / rank)
        for number, rank in enumerate(ranks)
    ]


def frozen_A_updates(ranks: list[int]) -> list[Update]:  # noqa: N802
    """Clients that all kept the first rows of the same A."""
    widest = random_state(max(ranks), seed=99)
    updates = random_updates(ranks)
    for update, rank in zip(updates, ranks, strict=True):
        state = dict(update.adapter)
        for layer in LAYERS:
            state[f"{layer}.lora_A.weight"] = widest[f"{layer}.lora_A.weight"][:rank].copy()
        updates[updates.index(update)] = Update(update.client, update.weight, state, update.scale)
    return updates


def dense_mean(updates: list[Update]) -> dict[str, NDArray[np.float64]]:
    """delta W* by the definition, from the files: the sum of p * s * B @ A as full matrices."""
    total = sum(update.weight for update in updates)
    mean: dict[str, NDArray[np.float64]] = {}
    for layer, shape in LAYERS.items():
        mean[layer] = np.zeros(shape)
        for update in updates:
            A = update.adapter[f"{layer}.lora_A.weight"].astype(np.float64)
            B = update.adapter[f"{layer}.lora_B.weight"].astype(np.float64)
            mean[layer] += update.weight / total * update.scale * (B @ A)
    return mean
