"""Names in the messages between server and clients."""

__all__ = ["ADAPTIVE", "EXPORTED", "HIDDEN"]

EXPORTED = "evaluate.exported"
"""Type of the message that asks for the loss of what the server has written."""
ADAPTIVE = "adaptive-clipping"
"""Key of a training message's config: the norm beside it changes from round to round."""
HIDDEN = ("loss", "weight", "examples", "learned-tokens", "wall-s", "edge-s", "memory-bytes")
"""Figures that a secure reply has under its masks only."""
