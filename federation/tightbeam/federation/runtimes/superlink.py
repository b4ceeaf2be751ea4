"""A federation of real nodes, on a SuperLink that is there."""

from dataclasses import replace
from pathlib import Path

from tightbeam.federation.client.surroundings import require_real
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.runtimes.flower import Flower, flower_home

__all__ = ["run_on_superlink"]


def run_on_superlink(run: RunConfig, address: str, ca: Path) -> None:
    """Run on a SuperLink that is there and whose nodes are registered; `ca` signed its TLS certificate.

    The experiment's folder is one of the SuperLink's machine, where its ServerApp runs; a relative one is in
    the SuperLink's working folder.

    Raises:
        RecipeError: the scenario asks for what only a simulation has.
        TightbeamError: see `Flower.run`.

    """
    run = replace(run, simulated=False)  # whoever is there has texts of its own, or says so
    require_real(run)
    Flower.prepare(flower_home(run.folder), "superlink", address, ca).run(run)
