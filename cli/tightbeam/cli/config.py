"""`tightbeam config`: the recipe's schema, and whether a recipe is right."""

import json

import typer

from tightbeam.cli.options import RecipePath, Settings, say

__all__ = ["app", "check", "schema"]

app = typer.Typer(help="Look at recipes.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from tightbeam.edge.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def check(recipe: RecipePath, settings: Settings = None) -> None:
    """Check a recipe and print it resolved: every key, defaults included."""
    from tightbeam.edge.recipe import load_recipe

    checked = load_recipe(recipe, settings or [])
    from tightbeam.edge.model.adapters import method_arguments  # slow: it asks PEFT

    method_arguments(checked.adapter)
    typer.echo(checked.resolved_yaml(), nl=False)
    say(f"{recipe} is right; its run would write to {checked.run_folder}")
