"""`tightbeam cache`: the sealed activations that cached training leaves on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from tightbeam.cli.options import IdentityFolder, say

__all__ = ["app", "clear", "info", "verify"]

app = typer.Typer(
    help="Look at, check or empty a cache of activations.", no_args_is_help=True, rich_markup_mode=None
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="runs/NAME/cache, or what cache.dir says.")]


@app.command()
def info(folder: Folder) -> None:
    """Say what a cache holds; needs no key."""
    from tightbeam.edge.cache import inspect_cache

    typer.echo(inspect_cache(folder).render())


@app.command()
def verify(folder: Folder, identity: IdentityFolder = None) -> None:
    """Decrypt every entry; exit code 1 when one is damaged."""
    from tightbeam.common.identity.identities import load_identity
    from tightbeam.edge.cache import identity_secret, verify_cache

    secret = None if identity is None else identity_secret(load_identity(identity))
    good, problems = verify_cache(folder, secret)
    for problem in problems:
        say(problem)
    typer.echo(f"{good} samples are intact, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)


@app.command()
def clear(folder: Folder) -> None:
    """Remove a cache's files. The cloud is asked again when they are needed."""
    from tightbeam.edge.cache import clear_cache

    typer.echo(f"{clear_cache(folder) / 1e6:.1f} MB freed")
