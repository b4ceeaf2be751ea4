"""A training batch as packed rows: no padding is computed, and logits for learned tokens only.

The output head is the largest matrix at the edge (SmolLM2: 28 M weights against 3.5 M of a block), and most
tokens of a chat have no loss. Which rows a token attends to is the same as in the padded batch, and so is the
mean over learned tokens: the loss differs from the model's own in rounding only.

B = batch, T = padded length, N = real tokens, L = tokens with a loss, V = vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tightbeam.common.backbone import PACKED_ATTENTION, Segments, SegmentTable
from tightbeam.edge.cache import sample_digest
from tightbeam.edge.data import IGNORED

__all__ = ["PackedBatch", "packed_attention_in", "packed_loss"]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The real tokens of a padded batch, sequence after sequence."""

    input_ids_N: Tensor
    segments: Segments
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
        positions_N = torch.cat([torch.arange(n) for n in lengths])
        place_L = (next_N != IGNORED).nonzero().flatten()
        return cls(batch["input_ids"][keep_BT], Segments(lengths, positions_N), place_L, next_N[place_L])

    @property
    def digests(self) -> list[bytes]:
        """What the cache calls each sequence."""
        ids, positions = self.input_ids_N.tolist(), self.segments.positions_N.tolist()
        return [sample_digest(ids[a:b], positions[a:b]) for a, b in self.segments.bounds]


def packed_loss(model: nn.Module, packed: PackedBatch) -> Tensor:
    """Mean cross-entropy over the learned tokens, in nats; the model must be in `packed_attention_in`."""
    device = packed.input_ids_N.device
    logits_1LV = model(
        input_ids=packed.input_ids_N[None],
        position_ids=packed.segments.positions_N[None].to(device),
        segments=SegmentTable(packed.segments, device),
        logits_to_keep=packed.place_L,
        use_cache=False,
    ).logits
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
