"""How a training step uses the trunk: `registry.py` lists the modes, each in a file of its own.

Nothing heavy is imported before a mode is built.
"""

from tightbeam.edge.modes.registry import MODES, ModeSpec, recipe_modes, spec_of, trained_blocks

__all__ = ["MODES", "ModeSpec", "recipe_modes", "spec_of", "trained_blocks"]
