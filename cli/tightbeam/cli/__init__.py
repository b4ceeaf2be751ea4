"""The command `tightbeam`: one thin file per command; nothing heavy is imported before a command runs."""

from tightbeam.cli.app import main

__all__ = ["main"]
