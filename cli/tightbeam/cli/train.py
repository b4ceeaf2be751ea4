"""`tightbeam train`: the edge's side, one recipe from start to end."""

from typing import Annotated

import typer

from tightbeam.cli.options import RecipePath, Settings

__all__ = ["train"]


def train(
    recipe: RecipePath,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
) -> None:
    """Train an adapter here against a backbone there."""
    from tightbeam.edge.recipe import load_recipe

    checked = load_recipe(recipe, settings or [])  # before the slow imports: a typo is told at once
    from tightbeam.edge.training.run import run_recipe

    result = run_recipe(checked, resume=resume)
    typer.echo(result.folder.path)
    if result.exit_code:
        raise typer.Exit(result.exit_code)
