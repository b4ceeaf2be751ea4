"""The examples of a recipe: those to learn from and those held out, known by their content."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from tightbeam.edge.data.examples import Example, load_dataset
from tightbeam.edge.data.limits import Limits
from tightbeam.edge.data.order import split_examples
from tightbeam.edge.recipe import DataSection

__all__ = ["Splits"]


@dataclass(frozen=True, slots=True)
class Splits:
    """Tokenised examples of a run."""

    section: DataSection
    train: list[Example]
    eval: list[Example]
    warnings: list[str]  # what a user should read before training

    @classmethod
    def load(cls, section: DataSection, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Self:
        """Read the files of a recipe. Raises `DataError`, also for an example that no step could hold."""
        datasets = [
            load_dataset(
                path,
                tokenizer,
                record_format=section.format,
                max_length=section.max_length,
                answer_only=section.answer_only,
            )
            for path in (section.train, section.eval)
            if path is not None
        ]
        for dataset in datasets:
            limits.check(dataset.path, dataset.examples)
        warnings = [line for dataset in datasets for line in dataset.warnings()]
        train, held = datasets[0].examples, datasets[1].examples if len(datasets) > 1 else []
        if section.eval_fraction:
            train, held = split_examples(train, section.eval_fraction, section.shuffle_seed)
        return cls(section, train, held, warnings)

    def check_batches(self, limits: Limits, batches: Iterable[Sequence[int]], size: int) -> None:
        """Refuse what the cloud would refuse when its step comes; evaluations take `size` at a time.

        Raises:
            StepTooLargeError: see `Limits.check_batches`.

        """
        held = (self.eval[start : start + size] for start in range(0, len(self.eval), size))
        limits.check_batches(self.section.eval or self.section.train, held)
        longest = sorted(len(example.input_ids) for example in self.train)[-size:]
        if sum(longest) > limits.tokens_per_step:  # else no batch can be too large
            limits.check_batches(self.section.train, ([self.train[row] for row in rows] for rows in batches))

    def facts(self) -> dict[str, str]:
        """Digests of the tokens and labels, wherever their files are."""
        return {"data.train": _digest(self.train), "data.eval": _digest(self.eval)}


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        both = np.array([example.input_ids, example.labels], dtype="<i8")
        digest.update(len(example.input_ids).to_bytes(8) + both.tobytes())
    return digest.hexdigest()[:16]
