"""One task trained in several modes, side by side."""
