"""How a training step uses the trunk: `ushape` every time, `top` and `side` once per sample."""

from transformers import PreTrainedModel

from tightbeam.edge.cache.shortcut import FrozenParts
from tightbeam.edge.modes.base import Job, Mode
from tightbeam.edge.modes.freeze import Freeze
from tightbeam.edge.modes.side import Side
from tightbeam.edge.modes.top import FrozenBottom, Top
from tightbeam.edge.recipe import Recipe

__all__ = ["Freeze", "FrozenBottom", "Job", "Mode", "Side", "Top", "mode_for", "trained_blocks"]


def trained_blocks(recipe: Recipe, model: PreTrainedModel) -> range | None:
    """The blocks that get the adapter; None for all that are at the edge."""
    only_top = recipe.mode == "top" or (recipe.mode == "side" and not recipe.side.adapt_bottom)
    return FrozenParts.of(model).top if only_top else None


def mode_for(job: Job) -> Mode:
    """The mode that a job's recipe asks for."""
    if job.recipe.mode == "top":
        return Top(job)
    if job.recipe.mode == "side":
        return Side(job)
    return Mode(job) if job.recipe.train.freeze_bottom_after is None else Freeze(job)
