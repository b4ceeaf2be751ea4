"""The weighted mean of adapters: what federation does once per round, here once at the end.

A and B of a LoRA are averaged separately, which is not the mean of their products: good enough to show that
what two edges learned can meet, and the reason why exact ways exist.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tightbeam.common.errors import UsageError

__all__ = ["average_adapters", "weighted_mean"]


def weighted_mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average tensors of the same names and shapes; weights need not sum to 1.

    Raises:
        UsageError: no adapters, weights that do not add up to more than 0, or other names or shapes.

    """
    if not states or len(states) != len(weights) or min(weights) < 0 or sum(weights) <= 0:
        raise UsageError(f"{len(states)} adapters cannot be averaged with the weights {list(weights)}.")
    shapes = {name: tensor.shape for name, tensor in states[0].items()}
    for state in states[1:]:
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise UsageError(
                "The adapters have other tensors than each other.",
                cure="Train them with one cut and adapter.",
            )
    total = float(sum(weights))
    shares = [weight / total for weight in weights]
    return {name: _mean([state[name] for state in states], shares) for name in states[0]}


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Sum in float64, so that the order of the adapters does not show."""
    mean = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        mean += share * tensor
    return mean.to(tensors[0].dtype)


def average_adapters(folders: Sequence[Path], weights: Sequence[float], target: Path) -> Path:
    """Write the mean of adapters in PEFT's format to `target`, with the first one's configuration."""
    states = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    target.mkdir(parents=True, exist_ok=True)
    save_file(weighted_mean(states, weights), target / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(folders[0] / "adapter_config.json", target / "adapter_config.json")
    return target
