"""What a client has answered: for each model the one cohort whose sum it has agreed to unmask.

Two sums of one model differ by the updates of those who are in one of them only. So a client agrees to one
cohort per model; sums of one model then are of the same clients or have none in common, and whoever adds and
subtracts them gets nothing about fewer clients than a cohort has. The same cohort may be asked again: a round
that was cut off is done once more, and its sum is no news. Vectors without a consent open nothing and do not
count.
"""

from typing import Protocol

__all__ = ["Answered", "Cohort"]

Cohort = tuple[str, ...]


class Answered(Protocol):
    """Cohorts by the digest of their model; a dict is one, for as long as its process lives."""

    def get(self, model_sha256: bytes, /) -> Cohort | None:
        """The cohort for which this model was answered."""
        ...  # a Protocol's body

    def setdefault(self, model_sha256: bytes, cohort: Cohort, /) -> Cohort:
        """Keep the cohort unless there is one; the one that is kept."""
        ...  # a Protocol's body
