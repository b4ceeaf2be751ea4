"""The same training on the whole model in this process, with stock PEFT: what a split run is held against."""

from collections.abc import Iterable
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

from support.edge_runs import byte_tokenizer
from tightbeam.edge.data import collate, load_examples, split_examples
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.training.plan import Plan

__all__ = ["block_of", "local_losses"]

_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def block_of(name: str) -> int:
    """The block that a parameter belongs to."""
    return int(name.split(".layers.")[1].split(".")[0])


def local_losses(
    recipe: Recipe,
    model: Path,
    blocks: Iterable[int],
    *,
    freeze_at: int | None = None,
    num_frozen: int = 0,
    fresh_optimizer: bool = False,
) -> list[float]:
    """Loss of every optimizer step, LoRA r=2 on `blocks`, a constant rate, no clipping.

    Before step `freeze_at` the first `num_frozen` blocks stop learning; the optimizer goes on, or not.
    """
    examples = load_examples(recipe.data.train, byte_tokenizer())
    if recipe.data.eval_fraction:
        examples = split_examples(examples, recipe.data.eval_fraction, recipe.data.shuffle_seed)[0]
    plan = Plan(len(examples), recipe.train, recipe.data.shuffle_seed)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(recipe.train.seed)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=_PROJECTIONS,
        layers_to_transform=list(blocks),
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(whole, config)

    def optimizer_of() -> torch.optim.Optimizer:
        trained = [p for p in adapted.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=recipe.train.lr, weight_decay=0.0)

    optimizer, found = optimizer_of(), []
    for step in range(plan.total_steps):
        if step == freeze_at:
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and block_of(name) < num_frozen:
                    parameter.requires_grad_(False)
                    parameter.grad = None
            optimizer = optimizer_of() if fresh_optimizer else optimizer
        (rows,) = plan.micro_batches(step)
        loss = adapted(**collate([examples[row] for row in rows], 0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
