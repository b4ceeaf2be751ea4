"""The app of a simulated client; in a run that is no simulation, it is as the production one."""

from tightbeam.federation.client.client_app import client_app
from tightbeam.simulations.surroundings import SimulatedSurroundings

__all__ = ["app"]

app = client_app(SimulatedSurroundings())
