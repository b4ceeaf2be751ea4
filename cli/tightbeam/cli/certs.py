"""`tightbeam certs init`: a certificate authority, the cloud's identity and one for each client."""

from pathlib import Path
from typing import Annotated

import typer

from tightbeam.cli.options import say

__all__ = ["app", "init"]

app = typer.Typer(help="Make identities.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    pass


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gets ca/, cloud/ and a folder per client.")],
    client: Annotated[list[str], typer.Option(metavar="NAME", help="An edge's name. Repeatable.")],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name or address of the cloud besides localhost. Repeatable."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the certificates count.")] = 365,
) -> None:
    """Make identities; run it again with the same folder to add clients."""
    from tightbeam.common.authority import CLOUD_NAMES, init_certificates

    names = (*CLOUD_NAMES, *(host or []))
    made = init_certificates(folder, clients=client, cloud_names=names, days=days)
    for path in made.created:
        typer.echo(path)
    for path in made.kept:
        say(f"kept {path}, which was there")
