"""What a cloud and its model take, asked of all examples before the first step."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PretrainedConfig

from tightbeam.common.errors import DataError, StepTooLargeError
from tightbeam.edge.data.examples import Example
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a model and of the cloud that serves it; 0 where nothing is known."""

    num_positions: int = 0
    vocab_size: int = 0
    tokens_per_step: int = 0

    @classmethod
    def of(cls, card: Card) -> Self:
        """As a cloud's card has them."""
        config: Any = json.loads(card.config_json)
        nested = isinstance(config, dict) and config.get("text_config")
        text = nested if isinstance(nested, dict) else config
        vocab_size = text.get("vocab_size") if isinstance(text, dict) else None
        return cls(
            num_positions=card.limits.max_positions,
            vocab_size=vocab_size if isinstance(vocab_size, int) else 0,
            tokens_per_step=card.limits.max_tokens_per_step,
        )

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self:
        """Of a model on its own."""
        text = config.get_text_config()
        positions = getattr(text, "max_position_embeddings", 0)
        return cls(num_positions=positions, vocab_size=getattr(text, "vocab_size", 0))

    def check(self, path: Path, examples: Iterable[Example]) -> None:
        """Raise `DataError` for the first example that no step could hold."""
        for example in examples:
            size, highest = len(example.input_ids), max(example.input_ids, default=0)
            for limit, what in (
                (self.num_positions, "that the model has positions for"),
                (self.tokens_per_step, "that the cloud takes in a step"),
            ):
                if limit and size > limit:
                    raise DataError(
                        f"{path}:{example.line} has {size} tokens, more than the {limit} {what}.",
                        cure=f"Set data.max_length (data check: --max-length) to {limit}, or shorten it.",
                    )
            if self.vocab_size and highest >= self.vocab_size:
                raise DataError(
                    f"{path}:{example.line} has the token {highest}, beyond the model's {self.vocab_size}.",
                    cure="The tokenizer is not the model's: use the one that belongs to it.",
                )

    def check_batches(self, path: Path, batches: Iterable[Sequence[Example]]) -> None:
        """Raise `StepTooLargeError` for the first batch that the cloud takes in no step."""
        for batch in batches if self.tokens_per_step else ():
            size = sum(len(example.input_ids) for example in batch)
            if size > self.tokens_per_step:
                lines = ", ".join(str(example.line) for example in batch)
                raise StepTooLargeError(
                    f"{path}: lines {lines} come in one batch of {size} tokens, over the cloud's limit of "
                    f"{self.tokens_per_step}.",
                    cure="Lower train.batch_size or data.max_length.",
                )
