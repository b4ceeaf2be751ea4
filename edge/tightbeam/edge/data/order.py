"""In which order examples come, and which are held out: functions of a seed, the same on every machine."""

import random
from typing import TypeVar

from tightbeam.common.errors import DataError

__all__ = ["epoch_order", "split_examples"]

ItemT = TypeVar("ItemT")


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """Order of the examples in one epoch: the same on every machine, another one every epoch."""
    order = list(range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311  an order, not a secret
    return order


def split_examples(examples: list[ItemT], fraction: float, seed: int) -> tuple[list[ItemT], list[ItemT]]:
    """Hold out a share of the examples; at least one goes to either side.

    Raises:
        DataError: fewer than two examples.

    """
    if len(examples) < 2:
        raise DataError(
            "One example cannot be split into training and evaluation.", cure="Set data.eval_fraction=0."
        )
    order = epoch_order(len(examples), seed, -1)
    held = min(max(round(len(examples) * fraction), 1), len(examples) - 1)
    held_out = set(order[:held])
    return (
        [example for i, example in enumerate(examples) if i not in held_out],
        [examples[i] for i in sorted(held_out)],
    )
