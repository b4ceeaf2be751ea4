"""Side-tuning: a ladder beside the trunk, and bottom adapters whose change goes around it."""

from tightbeam.edge.side.files import load_side, save_side, write_side
from tightbeam.edge.side.ladder import Ladder, side_parameters
from tightbeam.edge.side.path import SidePath, SidePlan, add_side, choose_taps, side_of

__all__ = [
    "Ladder",
    "SidePath",
    "SidePlan",
    "add_side",
    "choose_taps",
    "load_side",
    "save_side",
    "side_of",
    "side_parameters",
    "write_side",
]
