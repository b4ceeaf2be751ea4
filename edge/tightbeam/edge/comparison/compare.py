"""`tightbeam compare`: the same task in several modes, one after another, each in a process of its own.

    <output.dir>/<output.name>-compare/<mode>/    the run folder of each mode
    <output.dir>/<output.name>-compare/           compare.html, compare.json

A process of its own, because peak memory is a figure of a process, and a mode shall not find warm what
another one has loaded. A cache that the recipe shares between runs is not used: a later mode would
cross nothing. `local` is the baseline: the whole model here, stock PEFT on the same blocks, no step crosses.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tightbeam.common.errors import RecipeError, TightbeamError, UsageError, error_from_code
from tightbeam.common.settings.messages import did_you_mean
from tightbeam.edge.modes.registry import MODES
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.comparison import ModeResult, read_result, write_comparison

__all__ = ["compare", "comparison_folder", "recipe_of"]

_FREEZE_AFTER = 0.5  # epochs, when the recipe does not say


def comparison_folder(recipe: Recipe) -> Path:
    """Where a comparison of this recipe lies."""
    return recipe.output.dir / f"{recipe.output.name}-compare"


def compare(recipe: Recipe, modes: Sequence[str]) -> tuple[list[ModeResult], Path]:
    """Train in each mode; gives the figures in that order, and the page's path.

    Raises:
        UsageError: an unknown mode, or one that is named twice.
        RecipeError: `local` without a whole checkpoint, or a folder that holds a run already.
        TightbeamError: what training in a mode raises; modes that ended before keep their folders.

    """
    recipes = {mode: recipe_of(recipe, mode) for mode in _checked(modes)}
    for mode_recipe in recipes.values():
        if mode_recipe.run_folder.exists():
            raise RecipeError(
                f"{mode_recipe.run_folder} is there already.",
                cure="Delete it, or give this comparison another output.name.",
            )
    for mode, mode_recipe in recipes.items():
        _train(mode, mode_recipe)
    results = [read_result(mode, mode_recipe.run_folder) for mode, mode_recipe in recipes.items()]
    return results, write_comparison(results, comparison_folder(recipe))


def recipe_of(recipe: Recipe, mode: str) -> Recipe:
    """What `recipe` becomes in one mode; raises `RecipeError` for `local` without a checkpoint."""
    plain: dict[str, Any] = recipe.model_dump()
    spec, freeze = MODES[mode], recipe.train.freeze_bottom_after or _FREEZE_AFTER
    plain["mode"] = spec.variant_of or spec.name
    plain["train"]["freeze_bottom_after"] = freeze if spec.crosses == "until frozen" else None
    if not spec.frozen_bottom:
        plain["train"]["noise"] = 0.0
    plain["cache"] |= {"dir": None, "enabled": True}
    plain["output"] |= {"dir": comparison_folder(recipe), "name": mode}
    if spec.whole_model:
        path = recipe.model.local_path
        if path is None or not path.is_dir():
            raise RecipeError(
                f"Mode {mode} needs the whole model here, and model.local_path is {path or 'not set'}.",
                cure="Set model.local_path to a checkpoint with the cloud's fingerprint, such as "
                f"--set model.local_path=FOLDER, or leave {mode} out of --modes.",
            )
        plain["train"]["max_mb"] = None
        plain["output"]["report"] = False  # that page is about what crossed
    return Recipe.model_validate(plain)


def _checked(modes: Sequence[str]) -> list[str]:
    for mode in modes:
        if mode not in MODES:
            raise UsageError(
                f"There is no mode {mode!r} to compare.{did_you_mean(mode, list(MODES))}",
                cure=f"Known are {', '.join(MODES)}.",
            )
    if not modes or len(set(modes)) < len(modes):
        raise UsageError("Each mode is compared once.", cure="Name one or more, such as local,ushape,top.")
    return list(modes)


def _train(mode: str, recipe: Recipe) -> None:
    command = [sys.executable, "-m", "tightbeam.edge.comparison.one_run", mode]
    done = subprocess.run(  # noqa: S603  # our own module; the recipe goes through a pipe
        command, input=recipe.resolved_yaml(), stdout=subprocess.PIPE, encoding="utf-8", check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return
    if not lines:
        raise TightbeamError(
            f"Mode {mode} ended with exit code {done.returncode}.", cure="What it printed says why."
        )
    told = json.loads(lines[-1])
    raise error_from_code(told["code"], f"Mode {mode}: {told['message']}", told["cure"])
