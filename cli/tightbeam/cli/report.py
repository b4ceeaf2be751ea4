"""`tightbeam report`: what runs cost, on the terminal, as a page and as data."""

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where to write; else the run, or the folder that several are in.",
        ),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with prices and watts of your own; else the cloud's."),
    ] = None,
) -> None:
    """Print what runs cost; write report.html, costs.json and costs.csv."""
    from tightbeam.common.accounts.prices import Prices
    from tightbeam.edge.report.report import write_files
    from tightbeam.edge.report.summary import summarise
    from tightbeam.edge.report.table import print_table

    costs = summarise(runs, Prices.load(prices) if prices else None)
    print_table(costs)
    # a report of several runs would overwrite that of the first one
    place = output or (runs[0] if len(runs) == 1 else os.path.commonpath([run.resolve() for run in runs]))
    typer.echo(write_files(costs, place))
