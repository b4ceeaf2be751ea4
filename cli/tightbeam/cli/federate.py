"""`tightbeam federate`: a scenario on a SuperLink that is there, with edges on machines of their own.

Both commands speak to the SuperLink's control interface, so they belong where edges do not get to.
"""

from pathlib import Path
from typing import Annotated

import typer

from tightbeam.cli.options import Settings, say

__all__ = ["app", "register", "run"]

app = typer.Typer(help="Train with real edges.", no_args_is_help=True, rich_markup_mode=None)

SuperLink = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the SuperLink listens.")]
Authority = Annotated[Path, typer.Option(metavar="FILE", help="The ca.crt that signed its certificate.")]


@app.command()
def register(
    roster: Annotated[
        Path, typer.Argument(metavar="DIR", help="Holds NAME.pub of each node: `tightbeam certs federation`.")
    ],
    superlink: SuperLink,
    ca: Authority,
) -> None:
    """Admit nodes by their public keys; those that are known already stay."""
    import tempfile

    from tightbeam.federation.runtimes.flower import Flower

    with tempfile.TemporaryDirectory() as home:
        for name in Flower.prepare(Path(home), "superlink", superlink, ca).register(roster):
            typer.echo(name)


@app.command()
def run(
    scenario: Annotated[
        Path, typer.Argument(metavar="SCENARIO", help="A YAML file; docs/federation.md has every key.")
    ],
    superlink: SuperLink,
    ca: Authority,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last complete round.")] = False,
) -> None:
    """Run a scenario with the nodes that are connected, one for each of its clients."""
    from tightbeam.common.errors import RecipeError
    from tightbeam.federation.requirements import require_flower
    from tightbeam.federation.scenario import load_scenario

    checked = load_scenario(scenario, settings or [])
    require_flower()
    if checked.cloud.address is None:
        raise RecipeError(f"{scenario} names no cloud.", cure="Set cloud.address to where edges reach it.")
    from tightbeam.federation.accounts.report import write_report
    from tightbeam.federation.contract.run_config import RunConfig
    from tightbeam.federation.runtimes.superlink import run_on_superlink

    where, cloud = checked.folder, checked.cloud
    assert cloud.address is not None
    run_on_superlink(RunConfig(checked, cloud.address, cloud.identities, where, resume), superlink, ca)
    if (where / "ledger.jsonl").exists():
        typer.echo(write_report(where, checked))
    else:
        say(f"done; adapter and accounts are in {where} of the SuperLink's machine")
