"""Mode `side`: top blocks, a ladder and the bottom's bypass are trained on activations that cross once.

What crosses is that of mode `top`, cut activations up and the trunk's answer down, and the taps beside the
answer. Unlike there, a bottom that has an adapter runs in every step. Its cut activations without it are kept
beside the answer, as long as all answers fit too.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from tightbeam.common.accounts.flops import EdgeFlops, attention_width, linear_params
from tightbeam.edge.cache import ActivationCache, Scope
from tightbeam.edge.cache.filler import Sample
from tightbeam.edge.cache.shortcut import TrunkShortcut, passed_through
from tightbeam.edge.modes.frozen import FrozenPhase
from tightbeam.edge.modes.top import Top
from tightbeam.edge.recipe import SideSection
from tightbeam.edge.side import SidePath, add_side, side_of
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["Side"]


class _SidePhase(FrozenPhase):
    """A cache stands behind the side path while training lasts."""

    def _freeze(self) -> str:
        return ""  # what is trained below the cut does not change what crosses

    def _scope(self, dtype: torch.dtype, width: int) -> Scope:
        scope, plan = super()._scope(dtype, width), self._side().plan
        if not plan.taps:
            return scope  # mode top keeps the same rows
        return replace(scope, taps=(f"{plan.projection} {plan.tap_size}", *map(str, plan.taps)))

    @contextmanager
    def _shortcut(self, dtype: torch.dtype, width: int) -> Iterator[TrunkShortcut]:
        side = self._side()
        side.cache = self.cache
        side.keeps_bottom = self.cache is not None and self._has_room(self.cache, side)
        try:
            yield side
        finally:
            side.cache = None

    def _has_room(self, cache: ActivationCache, side: SidePath) -> bool:
        """Whether the cut activations fit beside the answers that are still to come."""
        samples = {Sample(e.input_ids).digest: len(e.input_ids) for e in (*self.job.train, *self.job.eval)}
        answers = sum(side.answer_bytes(n) for digest, n in samples.items() if digest not in cache)
        return cache.has_room(answers + sum(map(side.bottom_bytes, samples.values())), 2 * len(samples))

    def _count_flops(self) -> None:
        """As a walk over the model finds them; the ladder's attention and taps are put right."""
        base, ladder = self.job.model.get_base_model(), self._side().ladder
        width, more_forward, more_backward, of_taps = attention_width(base.config), 0, 0, 0
        bottom = [self.parts.blocks[i] for i in self.parts.bottom]
        self._below = EdgeFlops(
            forward_weights=sum(map(_backbone_weights, bottom)),
            backward_weights=0,
            forward_attention=4 * width * len(bottom),
            backward_attention=0,
        )
        adapted = any(isinstance(inner, BaseTunerLayer) for block in bottom for inner in block.modules())
        with nullcontext() if adapted else passed_through(self.parts.blocks, self.parts.bottom):
            found = EdgeFlops.from_model(self.job.model)
        if ladder is not None:  # the walk took it for one block of the backbone's width
            rungs = sum(stage.mix.in_features for stage in ladder.rungs())
            more_forward += 4 * (rungs - width)
            more_backward += 8 * (rungs - width)
            of_taps = linear_params(ladder.up)  # which ask for no gradient
        self._top = EdgeFlops(
            forward_weights=found.forward_weights,
            backward_weights=found.backward_weights - of_taps,
            forward_attention=found.forward_attention + more_forward,
            backward_attention=found.backward_attention + more_backward,
        )

    def _side(self) -> SidePath:
        side = side_of(self.job.model)
        assert side is not None
        return side


class Side(Top):
    """The loop of mode `top` over a model with a side path."""

    phase_type = _SidePhase

    @staticmethod
    def extend(model: PeftModel, card: Card, side: SideSection) -> None:
        """Add the ladder and the bottom's way around the trunk; raises what `add_side` raises."""
        add_side(model, card, taps=side.taps, width=side.width, heads=side.heads)


def _backbone_weights(block: nn.Module) -> int:
    """Weight elements of a block's own matrices, adapters left out."""
    return sum(
        module.weight.numel()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name
    )
