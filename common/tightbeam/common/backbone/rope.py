"""Rotary embeddings whose frequencies depend on the longest position of a batch: longrope and dynamic NTK.

Both sides of a cut must choose the same ones, though padding is not sent, and the cloud must not choose by
what another tenant sent before: transformers' dynamic NTK remembers its longest batch.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["VaryingRope", "max_positions"]

_VARYING = ("dynamic", "longrope")


class VaryingRope:
    """Of one model; has no modules where positions mean the same in every batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules: list[Any] = [
            module for module in model.modules() if any(kind in _VARYING for _, kind in _kinds(module))
        ]
        self._steady = min((_steady(m, *kind) for m in self._modules for kind in _kinds(m)), default=0)

    def longest(self, positions_BT: Tensor) -> int:
        """For how many positions the model's forward has just chosen frequencies; 0 for the usual ones."""
        if not self._modules:
            return 0
        remembered = [
            int(value)
            for module in self._modules
            for name, value in vars(module).items()
            if name.endswith("max_seq_len_cached") and value > module.original_max_seq_len
        ]
        longest = max(int(positions_BT.max()) + 1, *remembered, 0)
        return longest if longest > self._steady else 0

    def forget(self, hidden_BTD: Tensor) -> None:
        """Go back to the frequencies of short sequences, as transformers does when it sees one."""
        first_11 = torch.zeros(1, 1, dtype=torch.int64, device=hidden_BTD.device)
        for module in self._modules:
            for layers, kind in _kinds(module):
                if kind == "dynamic":
                    module(hidden_BTD, first_11, *([layers] if layers else []))


def max_positions(config: PretrainedConfig) -> int:
    """What a sequence may have: dynamic NTK stretches what the model was trained with by its factor."""
    limit: int = config.max_position_embeddings
    rope: Any = getattr(config, "rope_parameters", None) or {}
    return int(limit * rope["factor"]) if rope.get("rope_type") == "dynamic" else limit


def _kinds(module: Any) -> list[tuple[str, str]]:
    """Types of layers, "" for all, and the type of rope that they use."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return list(kinds.items())
    return [("", kinds)] if isinstance(kinds, str) else []


def _steady(module: Any, layers: str, kind: str) -> int:
    """Up to how many positions the frequencies are the usual ones."""
    if kind != "longrope":
        return int(module.original_max_seq_len)
    rope = module.config.rope_parameters
    return int((rope[layers] if layers else rope)["original_max_position_embeddings"])
