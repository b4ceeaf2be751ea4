"""`tightbeam compare`: one recipe in several modes, side by side."""

from typing import Annotated

import typer

from tightbeam.cli.options import RecipePath, Settings
from tightbeam.edge.modes.registry import MODES

__all__ = ["compare"]


def compare(
    recipe: RecipePath,
    modes: Annotated[
        str, typer.Option(metavar="MODE,...", help=f"Of {', '.join(MODES)}.")
    ] = "ushape,freeze,top",
    settings: Settings = None,
) -> None:
    """Train the same task in several modes; print and write what each gives and takes."""
    from tightbeam.edge.recipe import load_recipe

    checked = load_recipe(recipe, settings or [])  # before the slow imports: a typo is told at once
    from tightbeam.edge.comparison.compare import compare as run
    from tightbeam.edge.report.comparison import print_comparison

    results, page = run(checked, [mode.strip() for mode in modes.split(",") if mode.strip()])
    print_comparison(results)
    typer.echo(page)
