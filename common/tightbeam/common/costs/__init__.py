"""What a run cost: rows, framing, stopwatches and prices.

The front door keeps to what is cheap to import. `costs.flops` needs torch, `costs.summary` and `costs.report`
belong to the command line's report, so each of them is imported by its own name.
"""

from tightbeam.common.costs.framing import wire_bytes
from tightbeam.common.costs.meter import JsonlLedger, StepMeter, peak_memory_bytes, read_ledger
from tightbeam.common.costs.prices import Prices
from tightbeam.common.costs.rows import StepBytes, StepRow

__all__ = [
    "JsonlLedger",
    "Prices",
    "StepBytes",
    "StepMeter",
    "StepRow",
    "peak_memory_bytes",
    "read_ledger",
    "wire_bytes",
]
