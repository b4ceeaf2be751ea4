"""One client in one round: it wears the adapter that it is sent, trains it, hands it back.

No Flower here: arrays in, arrays and figures out. Names of arrays are those of PEFT's files.
"""

from tightbeam.edge.link.offer import held_bytes
from tightbeam.edge.training.objective import pad_id
from tightbeam.federation.client.adapter import SplitAdapter
from tightbeam.federation.client.lender import AdapterShape, Lender
from tightbeam.federation.client.work import CachePlace, LocalTask, Work, Workplace

__all__ = [
    "AdapterShape",
    "CachePlace",
    "Lender",
    "LocalTask",
    "SplitAdapter",
    "Work",
    "Workplace",
    "held_bytes",
    "pad_id",
]
