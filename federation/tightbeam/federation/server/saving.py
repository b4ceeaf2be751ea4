"""The global adapter as a folder that Hugging Face PEFT opens, side networks with it.

adapter_model.safetensors, adapter_config.json    the adapters of all blocks that anybody shares
side.safetensors, side.json                       the side network, where all that share one have the same
side-<cut>-<digest>/side.*                        else each kind in a folder of its own
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from safetensors.numpy import save

from tightbeam.common.files import atomic_write
from tightbeam.edge.side import SidePlan, write_side
from tightbeam.federation.server.global_adapter import GlobalAdapter

__all__ = ["save_global_adapter"]

_PREFIX = "base_model.model."  # of PEFT's wrappers, before the name of a layer


def save_global_adapter(
    folder: Path, state: GlobalAdapter, scale: float, model: str, sides: Mapping[str, SidePlan]
) -> Path:
    """Write the folder; an older one in its place is replaced. `sides` are by `ladder_prefix`."""
    whole = state.whole()
    rank = max(whole.rank, 1)
    even = whole.resized(rank)
    names = [layer.removeprefix(_PREFIX) for layer in even.modules]
    config = LoraConfig(
        r=rank,
        lora_alpha=_plain(scale * rank),
        target_modules=names,
        base_model_name_or_path=model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    config.save_pretrained(new)
    atomic_write(new / "adapter_model.safetensors", save(even.state(scale), {"format": "pt"}))
    for prefix, plan in sides.items():
        kind = "-".join(("side", *prefix.strip(".").replace(":", "-").split(".")[1:]))
        _save_side(new if len(sides) == 1 else new / kind, prefix, plan, state)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)
    return folder


def _save_side(folder: Path, prefix: str, plan: SidePlan, state: GlobalAdapter) -> None:
    """As `tightbeam.edge.side.load_side` reads it."""
    folder.mkdir(exist_ok=True)
    ladder = {name: array for name, array in state.learned.rest.items() if name.startswith(prefix)}
    tensors = {n.removeprefix(prefix): torch.from_numpy(a.astype(np.float32)) for n, a in ladder.items()}
    write_side(folder, plan, tensors)


def _plain(value: float) -> int | float:
    """PEFT declares alpha as an integer."""
    return int(value) if float(value).is_integer() else value
