"""The training loop, the run that it belongs to, and what a run leaves behind."""
