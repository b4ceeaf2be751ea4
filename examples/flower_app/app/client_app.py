"""The client's app."""

from tightbeam.federation.client.client_app import app

__all__ = ["app"]
