"""The typer app: which commands there are, and how an error becomes one line and an exit code.

Exit codes: 0 done; 1 something failed; 2 a wrong command, option, recipe or data file; 3 an identity;
4 a step that the cloud will never accept; 5 damage on the wire; 6 the cloud is away or busy;
7 a federated round that cannot go on; 130 Ctrl-C.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
import typer.core

from tightbeam.cli import (
    cache,
    certs,
    compare,
    config,
    data,
    demo,
    doctor,
    federate,
    report,
    serve,
    simulate,
    train,
    usage,
)
from tightbeam.cli.options import say
from tightbeam.common.errors import TightbeamError

__all__ = ["app", "main"]

typer.core.HAS_RICH = False  # or --help, which is plain text, would say \[required] and \[default: ...]

app = typer.Typer(
    name="tightbeam",
    help="Fine-tune large models on private data against a frozen backbone that stays in the cloud.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    suggest_commands=False,  # click suggests already
)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("doctor")(doctor.doctor)
app.command("usage")(usage.usage)
app.command("demo")(demo.demo)
app.command("simulate")(simulate.simulate)
app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")
app.add_typer(certs.app, name="certs")
app.add_typer(config.app, name="config")
app.add_typer(federate.app, name="federate")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tightbeam {version('tightbeam')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit; TIGHTBEAM_DEBUG=1 shows the traceback of an error that has a cure."""
    try:
        app(args=arguments, prog_name="tightbeam")
    except (TightbeamError, OSError) as error:
        if os.environ.get("TIGHTBEAM_DEBUG") == "1":
            raise
        say(f"error: {_one_line(error)}")
        sys.exit(error.exit_code if isinstance(error, TightbeamError) else 1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
