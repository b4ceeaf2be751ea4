"""What a recipe becomes before its first step: examples in order, an adapter, an optimizer, a schedule."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tightbeam.edge.data import Limits, Splits
from tightbeam.edge.model.adapters import attach_adapter
from tightbeam.edge.modes import spec_of, trained_blocks
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.training.facts import run_facts
from tightbeam.edge.training.plan import Plan
from tightbeam.edge.training.schedule import make_scheduler
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["Setup"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a recipe trains, and on what."""

    data: Splits
    plan: Plan
    facts: dict[str, str]  # what a resumed run must have too
    model: PeftModel
    optimizer: Optimizer
    scheduler: LRScheduler

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fingerprint: str,
        card: Card | None,
        warn: Callable[[str], None],
    ) -> Self:
        """Read the data, seed everything, and attach the adapter; without a `card` the model is whole.

        Raises:
            DataError: no usable example.
            RecipeError: an adapter that does not fit.

        """
        limits = Limits.of_model(model.config) if card is None else Limits.of(card)
        data = Splits.load(recipe.data, tokenizer, limits)
        for warning in data.warnings:
            warn(warning)
        plan = Plan(len(data.train), recipe.train, recipe.data.shuffle_seed)
        spec = spec_of(recipe)
        once = spec.crosses == "once" and recipe.cache.enabled  # later epochs do not cross
        batches = plan.batches(plan.steps_per_epoch if once else plan.total_steps)
        data.check_batches(limits, batches, recipe.train.batch_size)
        facts = run_facts(recipe, model, tokenizer, fingerprint, card) | data.facts()
        _seed_everything(recipe.train.seed)
        adapted: PeftModel = attach_adapter(model, recipe.adapter, trained_blocks(recipe, model))
        spec.extend(adapted, card, recipe.side)
        optimizer = _adamw(recipe, adapted)
        scheduler = make_scheduler(optimizer, recipe.train, plan.total_steps)
        return cls(data=data, plan=plan, facts=facts, model=adapted, optimizer=optimizer, scheduler=scheduler)


def _adamw(recipe: Recipe, model: PeftModel) -> Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    # One pass over the numbers instead of a dozen; on a CPU they are most of what a step of AdamW takes.
    fused = trained[0].device.type == "cpu"
    section = recipe.train
    return torch.optim.AdamW(trained, lr=section.lr, weight_decay=section.weight_decay, fused=fused)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
