"""How a training step uses the trunk: `ushape` every time, `top` once per sample, and in between."""

from transformers import PreTrainedModel

from tightbeam.common.config import Recipe
from tightbeam.edge.cache.shortcut import FrozenParts
from tightbeam.edge.modes.base import Job, Mode
from tightbeam.edge.modes.freeze import Freeze
from tightbeam.edge.modes.top import Top

__all__ = ["Freeze", "Job", "Mode", "Top", "mode_for", "trained_blocks"]


def trained_blocks(recipe: Recipe, model: PreTrainedModel) -> range | None:
    """The blocks that get the adapter; None for all that are at the edge."""
    return FrozenParts.of(model).top if recipe.mode == "top" else None


def mode_for(job: Job) -> Mode:
    """The mode that a job's recipe asks for."""
    if job.recipe.mode == "top":
        return Top(job)
    return Mode(job) if job.recipe.train.freeze_bottom_after is None else Freeze(job)
