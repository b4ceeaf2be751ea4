"""Settings files: reading YAML, checking it, and saying what is wrong."""
