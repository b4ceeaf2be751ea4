"""What both sides must agree on: cutting models, the sealed wire, the accounting. Imports neither side."""
