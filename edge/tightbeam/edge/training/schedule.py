"""The learning rate over a run's optimizer steps."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from tightbeam.edge.recipe import TrainSection

__all__ = ["make_scheduler"]


def make_scheduler(
    optimizer: Optimizer, section: TrainSection, total_steps: int, first_step: int = 0
) -> LRScheduler:
    """The section's schedule over `total_steps`, entered at `first_step` (counted from 0)."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # which torch wants to be told when entered later
    warmup, last = section.warmup_steps, first_step - 1
    scheduler: LRScheduler
    if section.schedule == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup, last_epoch=last)
    elif section.schedule == "cosine":
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total_steps, last_epoch=last)
    else:
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total_steps, last_epoch=last)
    return scheduler
