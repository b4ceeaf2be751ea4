"""How the aggregators compare in error, bytes and time: `python benchmarks/aggregation.py`.

Clients with ranks 4, 8 and 16 (FedIT: all 8; FFA-LoRA: nested, frozen A) on the 60 query and value
projections of a model the size of SmolLM2-135M. Their factors share a part, as adapters trained from one
start do; how much, is `SHARED`. Errors are relative Frobenius distances to the weighted mean of delta W, for
a client that gets the whole aggregate, rank 16, 8 and 4; with FLoRA everybody gets the whole. Means over
`SEEDS`. One thread. The last line is JSON.
"""

import json
import time

import numpy as np
from numpy.typing import NDArray

from tightbeam.federation.math import AGGREGATORS, Aggregate, Update, aggregator_named

LAYERS, OUT, IN = 60, 576, 576
RANKS = [4, 8, 16]
SHARED = 0.7  # of each factor's variance, the same for all clients
SEEDS = range(3)


def updates_for(name: str, seed: int) -> list[Update]:
    """Three clients as the aggregator wants them; PEFT's alpha is 16 for all, so scales are 4, 2 and 1."""
    ranks = [8, 8, 8] if name == "fedit" else RANKS
    states: list[dict[str, NDArray[np.float32]]] = [{} for _ in ranks]
    rng = np.random.default_rng(seed)
    for layer in range(LAYERS):
        common_A, common_B = rng.normal(size=(16, IN)), rng.normal(size=(OUT, 16))
        for rank, state in zip(ranks, states, strict=True):
            own_A, own_B = rng.normal(size=(rank, IN)), rng.normal(size=(OUT, rank))
            A = np.sqrt(SHARED) * common_A[:rank] + np.sqrt(1 - SHARED) * own_A
            B = np.sqrt(SHARED) * common_B[:, :rank] + np.sqrt(1 - SHARED) * own_B
            prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            state[f"{prefix}.lora_A.weight"] = (common_A[:rank] if name == "ffa" else A).astype(np.float32)
            state[f"{prefix}.lora_B.weight"] = B.astype(np.float32)
    return [
        Update(f"client-{rank}-{number}", float(number + 1), state, 16 / rank)
        for number, (rank, state) in enumerate(zip(ranks, states, strict=True))
    ]


def measure(name: str, seed: int) -> dict[str, float]:
    """Error at each rank, bytes of what a rank-8 client gets, seconds to aggregate."""
    updates = updates_for(name, seed)
    started = time.perf_counter()
    result: Aggregate = aggregator_named(name).aggregate(updates)
    aggregate_s = time.perf_counter() - started
    state = result.state(2.0, None if result.folds else 8)
    down = sum(tensor.nbytes for key, tensor in state.items() if name != "ffa" or "lora_B" in key)
    errors = {
        f"error_rank{rank}": result.relative_error(None if result.folds else rank) for rank in (16, 8, 4)
    }
    return {
        "rank": result.adapter.rank,
        "error": result.relative_error(),
        **errors,
        "down_bytes": down,
        "aggregate_s": aggregate_s,
    }


def main() -> None:
    """Print the table and the JSON line."""
    columns = ("error", "error_rank16", "error_rank8", "error_rank4")
    print(f"{'':<10}{'rank':>5}{'error':>10}{'at 16':>10}{'at 8':>10}{'at 4':>10}{'down MB':>9}{'s':>7}")
    table = {}
    for name in AGGREGATORS:
        rows = [measure(name, seed) for seed in SEEDS]
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        errors = "".join(f"{mean[key]:>10.1e}" for key in columns)
        size = f"{mean['down_bytes'] / 1e6:>9.2f}"
        print(f"{name:<10}{mean['rank']:>5.0f}{errors}{size}{mean['aggregate_s']:>7.2f}")
        table[name] = mean
    print(json.dumps({"ranks": RANKS, "shared": SHARED, "seeds": list(SEEDS), **table}))


if __name__ == "__main__":
    main()
