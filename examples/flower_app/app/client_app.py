"""The client's app."""

from tightbeam.simulations.client_app import app

__all__ = ["app"]
