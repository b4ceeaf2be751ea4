"""The Flower apps of a federation: the same objects on every runtime.

`client_app:app` and `server_app:app` are what a Flower project names as its components.
"""
