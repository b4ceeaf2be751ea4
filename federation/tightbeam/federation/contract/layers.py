"""What clients share: names of a ladder's arrays, shapes of layers, and where training starts."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tightbeam.edge.side import SidePlan
from tightbeam.federation.math import LoraAdapter, parse_adapter

__all__ = ["LADDER", "fresh", "ladder_prefix", "layers_of"]

LADDER = "ladder."
"""Names of a ladder's arrays begin with it."""


def ladder_prefix(plan: SidePlan) -> str:
    """What the names of a ladder's arrays begin with: `ladder.<cut>.<digest>.`."""
    digest = hashlib.sha256(json.dumps(plan.facts(), sort_keys=True).encode()).hexdigest()
    return f"{LADDER}{plan.cut}.{digest[:12]}."


def layers_of(shapes: Mapping[str, Sequence[int]], origin: str) -> LoraAdapter:
    """Empty modules, rank 0, for factors of these shapes and names; zeros for what is no factor."""
    probe = {name: np.zeros(_probe_shape(name, shape)) for name, shape in shapes.items()}
    parsed = parse_adapter(probe, 1.0, origin)
    return LoraAdapter({layer: m.truncated(0) for layer, m in parsed.modules.items()}, parsed.rest)


def _probe_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if ".lora_A." in name:
        return 1, shape[1]
    return (shape[0], 1) if ".lora_B." in name else tuple(shape)


def fresh(adapter: LoraAdapter, rank: int, seed: int) -> LoraAdapter:
    """Where training starts: delta W is zero and a ladder's change is zero; the same for the same seed."""
    rest = {
        name: _fresh_tensor(name, tensor.shape, np.random.default_rng([seed, number]))
        for number, (name, tensor) in enumerate(sorted(adapter.rest.items()))
    }
    return LoraAdapter(adapter.modules, rest).restarted(rank, seed)


def _fresh_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Of a ladder, as `tightbeam.edge.side.Ladder` itself begins."""
    if not shape or name.endswith(".leave.weight"):
        return np.zeros(shape)  # a gate in its middle; the last matrix, so that the model is the backbone
    if len(shape) == 1:
        return np.ones(shape)  # of a norm
    bound = 1 / np.sqrt(shape[1])
    return rng.uniform(-bound, bound, shape)
