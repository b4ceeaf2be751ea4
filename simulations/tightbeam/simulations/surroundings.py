"""What is around a simulated client: dealt texts, a line as slow as its profile, dropouts and stragglers.

All of it follows from the scenario and its seed, so it is the same on every runtime.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tightbeam.federation.client.participant import Client
from tightbeam.federation.client.surroundings import require_real
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.simulations.shaping import ShapedLine, require_local
from tightbeam.simulations.shards import client_files

__all__ = ["SimulatedSurroundings"]


class SimulatedSurroundings:
    """Those of a simulation; in a run that is none, they are real."""

    def require(self, run: RunConfig) -> None:
        """Raise `RecipeError` for faults in a run that does not say that it is a simulation."""
        if not run.simulated:
            require_real(run)

    def texts(self, client: Client) -> tuple[Path, Path]:
        """Its own files if it was given some, else its share of the scenario's data."""
        own = client.node
        if own.train is not None and own.eval is not None:
            return own.train, own.eval
        return client_files(client.scenario, client.run_config.folder, client.profile.name)

    @contextmanager
    def line(self, client: Client, address: str) -> Iterator[str]:
        """The address itself, or a relay to it that is as slow as the profile says."""
        if not client.run_config.shape:
            yield address
            return
        require_local(address)
        with ShapedLine(address, client.profile.options.network) as line:
            yield line.address

    def vanishes(self, client: Client, number: int) -> bool:
        """By the scenario's dice."""
        return client.draw("dropout", number).random() < client.scenario.faults.dropout

    def slowdown(self, client: Client, number: int) -> float:
        """By the scenario's dice."""
        faults = client.scenario.faults
        return faults.slowdown if client.draw("straggler", number).random() < faults.straggler else 1.0
