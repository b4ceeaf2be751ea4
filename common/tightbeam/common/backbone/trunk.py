"""The trunk: frozen blocks applied to packed rows. One small interface, `Trunk`, wherever they may run.

`PackedTrunk` drives a stock transformers model without knowing its family: the model's own forward computes
rotary embeddings and per-layer arguments, while a slot in each block's place swaps in the boundary input at
the first wanted block and takes the result out after the last.

N = packed tokens, D = hidden size.
"""

from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tightbeam.common.backbone.attention import PACKED_ATTENTION, SegmentTable
from tightbeam.common.backbone.families import Anatomy, dissect
from tightbeam.common.backbone.packing import Segments
from tightbeam.common.backbone.rope import VaryingRope

__all__ = ["PackedTrunk", "Trunk"]


class Trunk(Protocol):
    """Frozen blocks applied to packed rows."""

    def __call__(self, hidden_ND: Tensor, segments: Segments) -> Tensor:
        """Hidden states after the trunk's last block, `[N, D]`; differentiable in `hidden_ND`."""
        ...


class _Flight:
    """What the slots share during one pass."""

    def __init__(self, span: range, hidden_1ND: Tensor, taps: Collection[int] = ()) -> None:
        self.span = span
        self.hidden_1ND = hidden_1ND
        self.taps = taps
        self.tapped: dict[int, Tensor] = {}  # block -> what it put out


class _Slot(nn.Module):
    """Stands in one block's place and lets it work only within the wanted span."""

    def __init__(self, index: int, block: nn.Module, pilot: "PackedTrunk") -> None:
        super().__init__()
        self.index, self.block = index, block
        self._pilot = (pilot,)  # in a tuple: not a submodule

    def forward(self, hidden_1ND: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flight = self._pilot[0].flight
        assert flight is not None
        self._pilot[0].tells_positions = kwargs.get("position_ids") is not None
        if self.index in flight.span:
            result = self.block(flight.hidden_1ND, *args, **kwargs)
            flight.hidden_1ND = result[0] if isinstance(result, tuple) else result
            if self.index in flight.taps:
                flight.tapped[self.index] = flight.hidden_1ND
        return hidden_1ND  # the model's own stream stays a dummy; the result is taken from the flight

    @property
    def attention_type(self) -> Any:
        """Some models ask their blocks for it."""
        return self.block.attention_type


class PackedTrunk:
    """Runs any span of a model's blocks on packed rows. Not thread-safe: one worker owns it.

    Takes over `model`: its blocks move into slots and its attention becomes `packed_attention`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model.eval().requires_grad_(False)
        self.model = model
        self.anatomy: Anatomy = dissect(model)
        self.flight: _Flight | None = None
        self.tells_positions = False  # whether the model gives its blocks position_ids, as an edge needs
        self.blocks = list(self.anatomy.blocks)
        self.config = model.config.get_text_config()
        for index, block in enumerate(self.blocks):
            self.anatomy.blocks[index] = _Slot(index, block, self)
        self._rope = VaryingRope(model)
        self.set_attention(PACKED_ATTENTION)

    @property
    def num_blocks(self) -> int:
        """L, whether loaded or not."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    def set_attention(self, implementation: str) -> None:
        """Choose the attention function by its name in transformers' registry."""
        self.model.set_attn_implementation(implementation)

    def run(self, hidden_ND: Tensor, segments: Segments, span: range) -> Tensor:
        """Apply blocks `span` to `[N, D]`; gradients flow to `hidden_ND` when it asks for them."""
        return self.run_tapped(hidden_ND, segments, span, ())[0]

    def run_tapped(
        self, hidden_ND: Tensor, segments: Segments, span: range, taps: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The same, and what the blocks `taps` within the span put out, `[N, D]` each."""
        table = SegmentTable(segments, hidden_ND.device)
        flight = _Flight(span, hidden_ND[None], taps)
        out_1ND = self._fly(flight, segments.positions_N[None], segments=table)
        return out_1ND[0], {index: tap_1ND[0] for index, tap_1ND in flight.tapped.items()}

    def run_plain(self, hidden_BTD: Tensor, positions_BT: Tensor | None, span: range) -> Tensor:
        """The same blocks with whatever stock attention is set, unpacked: the reference of the self-test.

        Without positions the model counts them itself, as it does at the edge.
        """
        return self._fly(_Flight(span, hidden_BTD), positions_BT)

    def _fly(self, flight: _Flight, positions_BT: Tensor | None, **kwargs: Any) -> Tensor:
        self.flight, hidden_BTD = flight, flight.hidden_1ND
        self._rope.forget(hidden_BTD)
        width = getattr(self.config, "word_embed_proj_dim", self.hidden_size)  # OPT projects its embeddings
        dummy_BTW = hidden_BTD.new_zeros(1, 1, 1).expand(*hidden_BTD.shape[:2], width)
        if positions_BT is not None:
            kwargs["position_ids"] = positions_BT.to(hidden_BTD.device)
        try:
            self.anatomy.trunk_owner(inputs_embeds=dummy_BTW, use_cache=False, **kwargs)
            return flight.hidden_1ND
        finally:
            self.flight = None

    def span(self, span: range) -> Trunk:
        """A `Trunk` of fixed blocks, for use in the same process."""
        return lambda hidden_ND, segments: self.run(hidden_ND, segments, span)

    def device(self) -> torch.device:
        """Where the first loaded block lives."""
        return next(p.device for block in self.blocks for p in block.parameters() if not p.is_meta)
