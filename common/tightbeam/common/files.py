"""Folders of this user that all parts share."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """`$TIGHTBEAM_CACHE`, else `~/.cache/tightbeam`: downloaded and converted weights, the demo's files."""
    return Path(os.environ.get("TIGHTBEAM_CACHE") or Path.home() / ".cache" / "tightbeam").absolute()
