"""Devices and dtypes by name, the same words on both sides."""

import psutil
import torch

from tightbeam.common.errors import UsageError

__all__ = ["DTYPES", "choose_device", "choose_dtype", "free_memory_bytes"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then CPU; an absent device is named."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"Device {name!r} is not available here.", cure="Choose auto, cpu, cuda or mps."
        ) from error
    return device


def choose_dtype(name: str, stored: torch.dtype) -> torch.dtype:
    """`auto` takes the checkpoint's own."""
    if name == "auto":
        return stored
    if name not in DTYPES:
        raise UsageError(f"Unknown dtype {name!r}.", cure=f"Choose auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of the device that the trunk runs on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
