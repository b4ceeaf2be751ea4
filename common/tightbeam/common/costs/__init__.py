"""What a run cost: rows, framing, stopwatches and prices.

The front door keeps to what is cheap to import. `costs.flops` needs torch, `costs.summary` and `costs.report`
belong to the command line's report, so each of them is imported by its own name.
"""

from tightbeam.common.costs.framing import wire_bytes
from tightbeam.common.costs.rows import StepBytes, StepRow

__all__ = ["StepBytes", "StepRow", "wire_bytes"]
