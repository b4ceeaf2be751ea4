"""What is learned from examples: how they become a batch, and what the loss of a batch is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tightbeam.edge.data import IGNORED, Example, collate
from tightbeam.edge.modes.base import Mode

__all__ = ["CausalLM", "Objective", "pad_id"]


class Objective(Protocol):
    """A mean loss over what a batch teaches; batches count by how much that is."""

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The tensors of a batch, on the model's device."""

    def num_learned(self, batch: dict[str, Tensor]) -> int:
        """How much `loss` is the mean of."""

    def loss(self, mode: Mode, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch, by the way that the mode takes through the trunk."""


@dataclass(frozen=True, slots=True)
class CausalLM:
    """The next token, wherever it has a label."""

    pad_id: int
    device: torch.device

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Examples padded on the right."""
        return {name: t.to(self.device) for name, t in collate(examples, self.pad_id).items()}

    def num_learned(self, batch: dict[str, Tensor]) -> int:
        """Tokens with a loss: the first of each row has none, nothing predicts it."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, mode: Mode, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the learned tokens, in nats."""
        return mode.loss(batch)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do where the attention mask is 0; many tokenizers have no padding token of their own."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(candidate for candidate in candidates if isinstance(candidate, int)))
