"""The mathematics of federation: LoRA factors, aggregation, secure aggregation. Numpy only; knows no Flower.

`federation.secagg` has its own front door, since it needs `cryptography`.
"""

from tightbeam.federation.math.aggregation import (
    AGGREGATORS,
    Aggregate,
    Aggregator,
    FedIT,
    FfaLora,
    FlexLora,
    Flora,
    HetLora,
    ZeroPadding,
    aggregator_named,
    self_pruned_rank,
)
from tightbeam.federation.math.folding import beyond, kept, on_shared_A, plus, principal
from tightbeam.federation.math.lora import Arrays, LoraAdapter, LoraModule, fold, parse_adapter
from tightbeam.federation.math.updates import Update, check_update

__all__ = [
    "AGGREGATORS",
    "Aggregate",
    "Aggregator",
    "Arrays",
    "FedIT",
    "FfaLora",
    "FlexLora",
    "Flora",
    "HetLora",
    "LoraAdapter",
    "LoraModule",
    "Update",
    "ZeroPadding",
    "aggregator_named",
    "beyond",
    "check_update",
    "fold",
    "kept",
    "on_shared_A",
    "parse_adapter",
    "plus",
    "principal",
    "self_pruned_rank",
]
