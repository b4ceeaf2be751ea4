"""`tightbeam simulate`: many clients, one adapter, on this machine."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tightbeam.cli.options import Settings

__all__ = ["Runtime", "simulate"]


class Runtime(Enum):
    """As `tightbeam.simulations.experiment.Runtime`, which is too heavy to import here."""

    IN_PROCESS = "in-process"
    RAY = "ray"
    DEPLOYED = "deployed"


def simulate(
    scenario: Annotated[
        Path, typer.Argument(metavar="SCENARIO", help="A YAML file; docs/federation.md has every key.")
    ],
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last complete round.")] = False,
    runtime: Annotated[
        Runtime, typer.Option(help="What carries the messages: Flower in this process, on Ray, or deployed.")
    ] = Runtime.IN_PROCESS,
    shape: Annotated[
        bool, typer.Option("--shape", help="Make the clients' lines to the cloud as slow as they say.")
    ] = False,
) -> None:
    """Run a federated experiment with simulated clients against one cloud."""
    from tightbeam.federation.requirements import require_flower, require_ray
    from tightbeam.federation.scenario import load_scenario

    checked = load_scenario(scenario, settings or [])  # before the slow imports: a typo is told at once
    require_flower()
    if runtime is Runtime.RAY:
        require_ray()
    from tightbeam.simulations.experiment import run_scenario

    typer.echo(run_scenario(checked, resume=resume, runtime=runtime.value, shape=shape))
