"""Which examples each optimizer step takes: where a run is follows from its step number alone.

The order of examples is a function of seed and epoch. An optimizer step takes the next
`gradient_accumulation` micro-batches of its epoch, and the last step of an epoch takes what is left.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tightbeam.edge.data import epoch_order
from tightbeam.edge.recipe import TrainSection
from tightbeam.edge.training.checkpoints import Position

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """The schedule of a run over `num_examples` examples."""

    num_examples: int
    train: TrainSection
    shuffle_seed: int

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches."""
        return math.ceil(self.num_examples / self.train.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.batches_per_epoch / self.train.gradient_accumulation)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.epochs is not None
        return max(math.ceil(self.train.epochs * self.steps_per_epoch), 1)

    def micro_batches(self, step: int) -> list[list[int]]:
        """List the examples of optimizer step `step`, counted from 0, per micro-batch."""
        epoch, group = divmod(step, self.steps_per_epoch)
        order = _order(self.num_examples, self.shuffle_seed, epoch)
        size, first = self.train.batch_size, group * self.train.gradient_accumulation
        last = min(first + self.train.gradient_accumulation, self.batches_per_epoch)
        return [list(order[batch * size : (batch + 1) * size]) for batch in range(first, last)]

    def batches(self, steps: int) -> Iterator[list[int]]:
        """The micro-batches of the first `steps` optimizer steps."""
        for step in range(min(steps, self.total_steps)):
            yield from self.micro_batches(step)

    def position(self, steps_done: int, tokens: int) -> Position:
        """Where a run is after so many optimizer steps."""
        epoch, group = divmod(steps_done, self.steps_per_epoch)
        batch = group * self.train.gradient_accumulation
        return Position(optimizer_step=steps_done, epoch=epoch, batch=batch, tokens=tokens)


@functools.lru_cache(maxsize=2)
def _order(num_examples: int, seed: int, epoch: int) -> Sequence[int]:
    return tuple(epoch_order(num_examples, seed, epoch))
