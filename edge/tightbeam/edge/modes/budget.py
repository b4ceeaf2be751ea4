"""`train.max_mb`: what the coming step will move, so that a run stops before its budget and not after it.

Payloads are known to the byte from the codecs; framing, seals and TLS are bounded from above. Rows that
samples share are left out where it is known which samples cross together.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from peft import PeftModel

from tightbeam.common.errors import BudgetError
from tightbeam.edge.cache.filler import Pass
from tightbeam.edge.cache.shortcut import FrozenParts
from tightbeam.edge.data import Example
from tightbeam.edge.recipe import TrainSection
from tightbeam.edge.report.modes import TokenBytes

__all__ = ["Budget"]

_OVERHEAD = 1.02  # wire over payload bytes: tags, HTTP/2 frames and TLS stay below 2 %
_STEP_BYTES = 1500  # headers of one step, both directions
_SEQUENCE_BYTES = 20  # of them for each sequence of a large one: length, positions, shared rows


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper bounds of wire bytes, steps only: weights are fetched once for all runs and not counted."""

    max_bytes: float  # infinite without a budget
    forward_per_token: float = 0.0
    training_per_token: float = 0.0
    resumable: bool = True  # with another budget

    @classmethod
    def of(cls, section: TrainSection, model: PeftModel) -> "Budget":
        """The section's; unlimited without `train.max_mb`."""
        if section.max_mb is None:
            return cls(float("inf"))
        base = model.get_base_model()
        stepper = FrozenParts.of(base).trunk.stepper
        codecs, taps = stepper.codecs, stepper.taps
        width = int(base.config.get_text_config().hidden_size)
        tapped = {"num_taps": len(taps.blocks), "tap_size": taps.size} if taps else {}
        row = TokenBytes.of(width, codecs.model_dump(), **tapped)
        resumable = section.freeze_bottom_after is None
        return cls(section.max_mb * 1e6, row.forward, row.training, resumable)

    @property
    def is_set(self) -> bool:
        """Whether there is a budget."""
        return math.isfinite(self.max_bytes)

    def training(self, examples: Iterable[Example]) -> float:
        """Bytes of a forward and a backward over examples."""
        return _bytes(examples, self.training_per_token)

    def forward(self, examples: Iterable[Example]) -> float:
        """Bytes of a forward alone."""
        return _bytes(examples, self.forward_per_token)

    def ahead(self, pass_: Pass) -> float:
        """Bytes of a pass that fills the cache."""
        rows_bytes = pass_.num_rows * self.forward_per_token * _OVERHEAD
        return rows_bytes + pass_.num_steps * _STEP_BYTES + pass_.num_samples * _SEQUENCE_BYTES

    def allows(self, moved_bytes: int, next_bytes: float) -> bool:
        """Whether so much more fits."""
        return moved_bytes + next_bytes <= self.max_bytes

    def check(self, moved_bytes: int, next_bytes: float, step: int) -> None:
        """Raise `BudgetError` when so much more does not fit."""
        if not self.allows(moved_bytes, next_bytes):
            go_on = "Go on with --resume and" if step and self.resumable else "Start a run with"
            raise BudgetError(
                f"After {step} optimizer steps {moved_bytes / 1e6:.1f} MB have crossed; the next needs up to "
                f"{next_bytes / 1e6:.1f} MB, and train.max_mb is {self.max_bytes / 1e6:g}.",
                cure=f"{go_on} a larger train.max_mb, or start one with a smaller codec or "
                "train.freeze_bottom_after: auto.",
            )


def _bytes(examples: Iterable[Example], per_token: float) -> float:
    sizes = [len(example.input_ids) for example in examples]
    # Every example may travel in a step of its own.
    return sum(sizes) * per_token * _OVERHEAD + len(sizes) * _STEP_BYTES
