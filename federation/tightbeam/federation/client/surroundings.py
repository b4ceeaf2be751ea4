"""What is around a client: whose texts it has, its line to the cloud, and what goes wrong on purpose.

A node that stands for somebody has its own texts and its own line, and rolls no dice. All that is only
simulated of a client comes in here: `tightbeam.simulations.surroundings` is the other implementation.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tightbeam.common.errors import RecipeError
from tightbeam.federation.contract.run_config import RunConfig

if TYPE_CHECKING:
    from tightbeam.federation.client.participant import Client

__all__ = ["RealSurroundings", "Surroundings", "require_real"]

_FAULTS = ("dropout", "straggler", "deadline_s")


class Surroundings(Protocol):
    """What a client asks of its surroundings."""

    def require(self, run: RunConfig) -> None:
        """Refuse a run that asks for what is not here; raises `RecipeError`."""
        ...  # a Protocol's body

    def texts(self, client: "Client") -> tuple[Path, Path]:
        """The files that it learns from and is evaluated on."""
        ...  # a Protocol's body

    def line(self, client: "Client", address: str) -> AbstractContextManager[str]:
        """Where it reaches the cloud at `address`, as long as the context is open."""
        ...  # a Protocol's body

    def vanishes(self, client: "Client", number: int) -> bool:
        """Whether it drops out of round `number`."""
        ...  # a Protocol's body

    def slowdown(self, client: "Client", number: int) -> float:
        """How many times longer than modelled it takes in round `number`."""
        ...  # a Protocol's body


class RealSurroundings:
    """Of a node that stands for somebody: its own texts, its own line, nothing on purpose."""

    def require(self, run: RunConfig) -> None:
        """Raise `RecipeError` for a run that is a simulation."""
        require_real(run)

    def texts(self, client: "Client") -> tuple[Path, Path]:
        """The files that its node config names."""
        own = client.node
        assert own.train is not None  # the node config was checked
        assert own.eval is not None
        return own.train, own.eval

    def line(self, client: "Client", address: str) -> AbstractContextManager[str]:
        """The address itself."""
        return nullcontext(address)

    def vanishes(self, client: "Client", number: int) -> bool:
        """Never on purpose."""
        return False

    def slowdown(self, client: "Client", number: int) -> float:
        """As modelled."""
        return 1.0


def require_real(run: RunConfig) -> None:
    """Refuse a run that asks a real node for what only a simulation has.

    Raises:
        RecipeError: faults, dealt data or slow lines; names them.

    """
    faults = run.scenario.faults
    asked = [f"faults.{name}" for name in _FAULTS if getattr(faults, name)]
    asked += [name for name in ("simulated", "shape") if getattr(run, name)]
    if asked:
        raise RecipeError(
            f"{' and '.join(asked)}: only a simulation has that, and here nodes are real.",
            cure="Leave it out, or run the scenario with `tightbeam simulate`.",
        )
