"""`tightbeam certs`: identities of a cloud and its clients, and what a federation on Flower needs besides."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tightbeam.cli.options import say

__all__ = ["app", "federation", "init"]

if TYPE_CHECKING:
    from tightbeam.common.identity.authority import InitReport

Clients = Annotated[list[str], typer.Option(metavar="NAME", help="An edge's name. Repeatable.")]
Days = Annotated[int, typer.Option(min=1, help="How long the certificates count.")]
app = typer.Typer(help="Make identities.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    pass


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gets ca/, cloud/ and a folder per client.")],
    client: Clients,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name or address of the cloud besides localhost. Repeatable."),
    ] = None,
    days: Days = 365,
) -> None:
    """Make identities; run it again with the same folder to add clients."""
    from tightbeam.common.identity.authority import CLOUD_NAMES, init_certificates

    names = (*CLOUD_NAMES, *(host or []))
    _tell(init_certificates(folder, clients=client, cloud_names=names, days=days))


@app.command()
def federation(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Gets edges/, fleet/, nodes/ and roster/."),
    ],
    client: Clients,
    cloud_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name or address of the cloud besides localhost. Repeatable."),
    ] = None,
    fleet_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The same of the SuperLink and its proxy. Repeatable."),
    ] = None,
    days: Days = 365,
) -> None:
    """Make identities, a SuperLink's TLS and node keys; run it again to add clients."""
    from tightbeam.common.identity.node_keys import init_federation

    clouds, fleets = cloud_host or (), fleet_host or ()
    _tell(init_federation(folder, clients=client, cloud_hosts=clouds, fleet_hosts=fleets, days=days))


def _tell(made: "InitReport") -> None:
    for path in made.created:
        typer.echo(path)
    for path in made.kept:
        say(f"kept {path}, which was there")
