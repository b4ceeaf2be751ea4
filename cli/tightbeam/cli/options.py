"""Options that several commands share, so that they read and behave alike."""

from pathlib import Path
from typing import Annotated

import typer

from tightbeam.common.addresses import is_loopback
from tightbeam.common.errors import UsageError

__all__ = ["Address", "IdentityFolder", "Insecure", "RecipePath", "Settings", "require_loopback", "say"]

Address = Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the cloud listens.")]
IdentityFolder = Annotated[
    Path | None,
    typer.Option("--identity", metavar="DIR", help="This side's folder of `tightbeam certs init`."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="No TLS and no identities. Only between processes of one machine.")
]
RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file; docs/recipes.md has every key.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one recipe key, as in train.lr=1e-4. Repeatable."
    ),
]


def say(message: str) -> None:
    """Print chatter: to stderr, so that stdout holds the answer only."""
    typer.echo(message, err=True)


def require_loopback(address: str, identity: Path | None) -> None:
    """Refuse `--insecure` off this machine or beside an identity, and warn loudly where it is allowed."""
    if identity is not None:
        raise UsageError("--insecure and --identity exclude each other.", cure="Leave out --insecure.")
    if not is_loopback(address):
        raise UsageError(
            f"--insecure is refused for {address}: it is not a loopback address.",
            cure="Make identities with `tightbeam certs init` and give --identity DIR.",
        )
    say(
        "WARNING: --insecure: no TLS, and nobody proves who they are. Every user of this machine can connect."
    )
