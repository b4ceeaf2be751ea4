"""The server's app."""

from tightbeam.federation.server.server_app import app

__all__ = ["app"]
