"""The client's app."""

from tightbeam.simulations.apps.client_app import app

__all__ = ["app"]
