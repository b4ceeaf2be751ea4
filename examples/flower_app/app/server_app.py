"""The server's app."""

from tightbeam.simulations.apps.server_app import app

__all__ = ["app"]
