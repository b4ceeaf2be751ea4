"""Data files become examples: reading, chats and their label masks, and the order of an epoch."""

from tightbeam.edge.data.check import DataCheck, check_file
from tightbeam.edge.data.examples import (
    IGNORED,
    Dataset,
    Example,
    collate,
    load_dataset,
    load_examples,
)
from tightbeam.edge.data.limits import Limits
from tightbeam.edge.data.order import epoch_order, split_examples
from tightbeam.edge.data.splits import Splits

__all__ = [
    "IGNORED",
    "DataCheck",
    "Dataset",
    "Example",
    "Limits",
    "Splits",
    "check_file",
    "collate",
    "epoch_order",
    "load_dataset",
    "load_examples",
    "split_examples",
]
