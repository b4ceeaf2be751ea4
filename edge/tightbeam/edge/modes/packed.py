"""A training batch as packed rows: no padding is computed, shared beginnings once, logits for learned tokens.

The output head is the largest matrix at the edge (SmolLM2: 28 M weights against 3.5 M of a block), and most
tokens of a chat have no loss. What a token attends to is the same as in the padded batch, and so is the mean
over learned tokens: the loss differs from the model's own in rounding only.

B = batch, T = padded length, N = real tokens, M = rows, L = tokens with a loss, V = vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tightbeam.common.backbone import PACKED_ATTENTION
from tightbeam.edge.cache import sample_digest
from tightbeam.edge.data import IGNORED
from tightbeam.edge.model.packed_rows import PackedRows
from tightbeam.edge.modes.last_block import mlp_only_for

__all__ = ["PackedBatch", "packed_attention_in", "packed_loss"]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The real tokens of a padded batch, sequence after sequence."""

    rows: PackedRows
    place_L: Tensor  # of the tokens whose successor is learned
    target_L: Tensor  # that successor

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> "PackedBatch":
        """From `input_ids`, `attention_mask` and `labels`, each [B, T], padded on either side."""
        keep_BT = batch["attention_mask"].bool()
        next_BT = torch.full_like(batch["labels"], IGNORED)
        next_BT[:, :-1] = batch["labels"][:, 1:]
        next_N = next_BT[keep_BT]
        lengths = tuple(int(n) for n in keep_BT.sum(1).tolist() if n)
        place_L = (next_N != IGNORED).nonzero().flatten()
        return cls(PackedRows.of(batch["input_ids"][keep_BT], lengths), place_L, next_N[place_L])

    @property
    def num_read(self) -> int:
        """Rows that the head reads; fewer than `L` where one row has several successors."""
        shared = self.rows.shared
        return len((self.place_L if shared is None else shared.row_N[self.place_L]).unique())

    @property
    def digests(self) -> list[bytes]:
        """What the cache calls each sequence."""
        segments = self.rows.segments
        ids, positions = self.rows.input_ids_N.tolist(), segments.positions_N.tolist()
        return [sample_digest(ids[a:b], positions[a:b]) for a, b in segments.bounds]


def packed_loss(model: nn.Module, packed: PackedBatch, mlp: nn.Module | None = None) -> Tensor:
    """Mean cross-entropy over the learned tokens, in nats; the model must be in `packed_attention_in`.

    `mlp` is the last block's, if it may leave out what the head does not read.
    """
    shared = packed.rows.shared
    row_L = packed.place_L if shared is None else shared.row_N[packed.place_L]
    with mlp_only_for(mlp, row_L):
        logits_1LV = model(**packed.rows.inputs(), logits_to_keep=row_L, use_cache=False).logits
    return cross_entropy(logits_1LV[0].float(), packed.target_L)


@contextmanager
def packed_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's blocks attend within segments; its padded batches do not work meanwhile."""
    before = model.config._attn_implementation
    model.set_attn_implementation(PACKED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
