"""`tightbeam report`: what runs cost, on the terminal, as a page and as data."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write; else the first run.")
    ] = None,
) -> None:
    """Print what runs cost and write report.html, costs.json and CSV."""
    from tightbeam.common.costs.report import write_report

    typer.echo(write_report(runs, output or runs[0]))
