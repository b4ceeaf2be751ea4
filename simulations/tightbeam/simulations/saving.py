"""The global adapter as a folder that Hugging Face PEFT opens."""

import os
import re
import shutil
from pathlib import Path

from peft import LoraConfig
from safetensors.numpy import save

from tightbeam.common.runs import atomic_write
from tightbeam.simulations.global_adapter import GlobalAdapter

__all__ = ["save_global_adapter"]

_PREFIX = "base_model.model."  # of PEFT's wrappers, before the name of a layer


def save_global_adapter(folder: Path, state: GlobalAdapter, scale: float, model: str) -> Path:
    """Write adapter_model.safetensors and adapter_config.json; an older folder in its place is replaced."""
    whole = state.whole()
    rank = max(whole.rank, 1)
    even = whole.resized(rank)
    names = [re.escape(layer.removeprefix(_PREFIX)) for layer in even.modules]
    config = LoraConfig(
        r=rank,
        lora_alpha=_plain(scale * rank),
        target_modules="|".join(names),
        base_model_name_or_path=model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    config.save_pretrained(new)
    atomic_write(new / "adapter_model.safetensors", save(even.state(scale), {"format": "pt"}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)
    return folder


def _plain(value: float) -> int | float:
    """PEFT declares alpha as an integer."""
    return int(value) if float(value).is_integer() else value
