"""One mode of a comparison: `python -m tightbeam.edge.comparison.one_run MODE`, the recipe in YAML on stdin.

The last line of standard output is JSON: what became of it, or an error with its cure.
"""

import json
import re
import sys

import torch
import yaml
from rich.console import Console
from transformers import PreTrainedModel

from tightbeam.common.backbone import Cut, build_skeleton, config_from_dict, dissect, fill
from tightbeam.common.devices import choose_device, choose_dtype
from tightbeam.common.errors import TightbeamError, UsageError
from tightbeam.edge.link.connection import Cloud, connect
from tightbeam.edge.model.adapters import resolve_targets
from tightbeam.edge.model.weights import local_source
from tightbeam.edge.modes.registry import MODES
from tightbeam.edge.recipe import Recipe, recipe_from_mapping
from tightbeam.edge.training.progress import say
from tightbeam.edge.training.recipe_run import LoadedModel, TrainResult, train_recipe
from tightbeam.edge.training.run import run_recipe

__all__ = ["load_whole_model", "main", "same_blocks", "train_whole_model"]


def main(mode: str) -> int:
    """Train the recipe on standard input; gives the exit code."""
    recipe = recipe_from_mapping(yaml.safe_load(sys.stdin.read()))
    console = Console(stderr=True)
    say(console, f"mode {mode}")
    try:
        result = (
            train_whole_model(recipe, console)
            if MODES[mode].whole_model
            else run_recipe(recipe, console=console)
        )
        if result.exit_code:
            raise UsageError("it was interrupted.", cure="Compare again under another output.name.")
    except TightbeamError as error:
        print(json.dumps({"code": error.code, "message": error.message, "cure": error.cure}))
        return error.exit_code
    print(json.dumps({"optimizer_steps": result.optimizer_steps}))
    return 0


def train_whole_model(recipe: Recipe, console: Console | None = None) -> TrainResult:
    """Train with every block in this process; the cloud only says which backbone and tokenizer it serves.

    Raises what `connect` and `train_recipe` raise, and `FingerprintError` for another backbone.
    """
    section = recipe.model
    with connect(
        section.cloud, identity=section.identity, insecure=section.insecure, fingerprint=section.fingerprint
    ) as cloud:
        model, tokenizer, card = load_whole_model(cloud, recipe), cloud.load_tokenizer(), cloud.card
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        close=lambda: None,
        name=card.model,
        fingerprint=card.fingerprint,
        card=card,
    )
    return train_recipe(same_blocks(recipe, model), load=lambda _: loaded, console=console)


def load_whole_model(cloud: Cloud, recipe: Recipe) -> PreTrainedModel:
    """The backbone from `model.local_path`, which must be the cloud's."""
    section, card = recipe.model, cloud.card
    assert section.local_path is not None
    dtype = choose_dtype(card.dtype if section.dtype == "auto" else section.dtype, torch.float32)
    model = build_skeleton(config_from_dict(cloud.config), dtype)
    load = local_source(section.local_path, card, model, dissect(model))
    fill(model, load, lambda name: True, dtype, choose_device(section.device))
    model.config.use_cache = False
    model.name_or_path = model.config.name_or_path = card.model
    return model


def same_blocks(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """The recipe with its target modules named one by one, without those of the trunk's blocks."""
    trunk = Cut.parse(recipe.cut).trunk(len(dissect(model).blocks))
    wanted = re.compile(resolve_targets(model, recipe.adapter.target_modules))
    names = [
        name for name, _ in model.named_modules() if wanted.fullmatch(name) and _block(name) not in trunk
    ]
    adapter = recipe.adapter.model_copy(update={"target_modules": names})
    return recipe.model_copy(update={"adapter": adapter})


def _block(name: str) -> int:
    found = re.match(r".*?\.(\d+)\.", name)
    return int(found[1]) if found else -1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
