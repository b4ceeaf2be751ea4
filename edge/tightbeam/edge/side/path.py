"""The side path: what the cloud and the cache see stays frozen, what is trained goes around the trunk.

The bottom blocks run twice. Without their adapters and in evaluation mode they give the cut activations,
which never change: they cross, once a sample, and the answer is cached. With their adapters they give
what the top is to see. The top blocks get

    trunk(frozen)  +  (adapted - frozen)  +  ladder(adapted, taps)

The middle term is the residual stream: what a block adds below the trunk would reach the top through it.
Every gradient stays at the edge, and at step 0 both changes are zero, so the model is the backbone.

N = tokens, D = hidden size, W = D and the width of all taps.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from tightbeam.common.backbone import Cut, Segments, Taps
from tightbeam.common.errors import UsageError
from tightbeam.edge.cache.rows import unpack_entry
from tightbeam.edge.cache.shortcut import FrozenParts, TrunkShortcut
from tightbeam.edge.side.ladder import Ladder
from tightbeam.edge.stepper import Answer
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["SidePath", "SidePlan", "add_side", "choose_taps", "plan_side", "side_of", "split_cut"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SidePlan:
    """What a side network was built for; a saved one fits nothing else."""

    fingerprint: str  # of the backbone
    cut: str
    hidden_size: int
    taps: tuple[int, ...]  # blocks, ascending; none: no ladder, the bottom's change alone
    tap_size: int
    projection: str  # SHA-256
    width: int
    heads: int

    def asked(self) -> Taps | None:
        """What every step asks for."""
        return Taps(self.taps, self.tap_size, self.projection) if self.taps else None

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "taps": list(self.taps)}


class SidePath(TrunkShortcut):
    """Stands behind a `RemoteTrunk` for good; a cache comes and goes."""
    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """Inverse of `facts`, whatever else is there; raises KeyError or TypeError when something is not."""
        known = {field.name: facts[field.name] for field in fields(cls)}
        return cls(**{**known, "taps": tuple(known["taps"])})


    trains_below = True

    def __init__(self, parts: FrozenParts, plan: SidePlan, ladder: Ladder | None, dtype: torch.dtype) -> None:
        self.plan, self.ladder = plan, ladder
        self._inside = False
        self._frozen_ND: Tensor | None = None
        self._parameters_of = inspect.signature(parts.owner.forward)
        super().__init__(parts, None, dtype, plan.hidden_size)
        parts.trunk.stepper.taps = plan.asked()

    def remove(self) -> None:
        """Take the side network away; the model is an ordinary split one again."""
        super().remove()
        self.parts.trunk.stepper.taps = None
        self.parts.trunk.ladder = None

    def answer(self, hidden_ND: Tensor, segments: Segments) -> Tensor:
        """Input of the top blocks, `[N, D]`, differentiable in the adapted cut activations and the ladder."""
        frozen_ND = hidden_ND.detach() if self._frozen_ND is None else self._frozen_ND
        rows_NW = super().answer(frozen_ND, segments).to(hidden_ND.device, hidden_ND.dtype)
        out_ND = rows_NW[:, : self.plan.hidden_size] + (hidden_ND - frozen_ND)
        if self.ladder is not None:
            taps_NP = rows_NW[:, self.plan.hidden_size :].split(self.plan.tap_size, dim=1)
            out_ND = out_ND + self.ladder(hidden_ND, taps_NP, segments)
        return out_ND

    def pack(self, answer: Answer, start: int, stop: int) -> bytes:
        """The entries of the hidden states and of every tap, each after its length."""
        if not self.plan.taps:
            return super().pack(answer, start, stop)
        entries = [super(SidePath, self).pack(part, start, stop) for part in (answer, *answer.taps)]
        return b"".join(len(entry).to_bytes(4, "little") + entry for entry in entries)

    def unpack(self, entry: bytes, num_tokens: int) -> Tensor:
        """Hidden states and taps side by side, `[N, W]`."""
        if not self.plan.taps:
            return super().unpack(entry, num_tokens)
        widths, rows, offset = self._widths(), [], 0
        for width in widths:
            size = int.from_bytes(entry[offset : offset + 4], "little")
            part, offset = entry[offset + 4 : offset + 4 + size], offset + 4 + size
            rows.append(unpack_entry(self._wire_codec, part, num_tokens, width))
        return torch.cat(rows, dim=1)

    def rows(self, answer: Answer) -> Tensor:
        """Hidden states and taps side by side, `[N, W]`."""
        return torch.cat([part.hidden_ND for part in (answer, *answer.taps)], dim=1)

    def cut_activations(self, **inputs: Any) -> tuple[Tensor, Segments]:
        """What goes to the cloud: the frozen bottom's output, whatever its adapters have learned."""
        outer, self._inside = self._inside, True
        try:
            with _bare(self.parts.below):
                return super().cut_activations(**inputs)
        finally:
            self._inside = outer

    def _widths(self) -> list[int]:
        return [self.plan.hidden_size, *([self.plan.tap_size] * len(self.plan.taps))]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside or self.parts.trunk.shortcut is not self:
            return
        inputs, below = self._inputs(args, kwargs), self.parts.below
        adapted = any(isinstance(inner, BaseTunerLayer) for part in below for inner in part.modules())
        for child in module.children():
            if child is not self.parts.blocks:
                child.eval()
        if not adapted:
            _require_frozen(below)
            for part in below:
                part.eval()
        self._frozen_ND = self.cut_activations(**inputs)[0] if adapted else None
        self._lookup = self._find(args, kwargs)

    def _after(self, module: nn.Module, args: object, output: object) -> None:
        if not self._inside:
            self._frozen_ND = self._lookup = None

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = dict(self._parameters_of.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self._parameters_of.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        if given.get("input_ids") is None:
            raise UsageError(
                "Mode side needs token ids: what enters the bottom must not be trained.",
                cure="Pass input_ids, and use LoRA or another adapter of the blocks, not prompt tuning.",
            )
        return {name: value for name, value in given.items() if name not in _OUTPUT_OPTIONS}


_OUTPUT_OPTIONS = ("use_cache", "past_key_values", "output_hidden_states", "output_attentions", "return_dict")


@contextmanager
def _bare(below: list[nn.Module]) -> Iterator[None]:
    """The bottom as the backbone has it: adapters off, in evaluation mode."""
    modules = [inner for part in below for inner in part.modules()]
    tuners = [m for m in modules if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    modes = [(m, m.training) for m in modules]
    flags = [(p, p.requires_grad) for tuner in tuners for p in tuner.parameters()]
    try:
        for tuner in tuners:
            tuner.enable_adapters(False)
        for module in modules:
            module.training = False
        _require_frozen(below)
        yield
    finally:
        for tuner in tuners:
            tuner.enable_adapters(True)
        for module, training in modes:
            module.training = training
        for parameter, trained in flags:
            parameter.requires_grad_(trained)


def _require_frozen(below: list[nn.Module]) -> None:
    if any(p.requires_grad for module in below for p in module.parameters()):
        raise UsageError(
            "Weights of the bottom itself are trained, so its frozen output is lost.",
            cure="Train adapters of the bottom blocks, not their weights or the embeddings.",
        )


def choose_taps(trunk: range, count: int) -> tuple[int, ...]:
    """`count` blocks spread evenly over the trunk, its last among them; all of a shorter trunk."""
    count = min(count, len(trunk))
    return tuple(trunk[round(place * len(trunk) / count) - 1] for place in range(1, count + 1))


def add_side(
    model: PreTrainedModel | PeftModel, card: Card, *, taps: int = 8, width: int = 192, heads: int = 4
) -> SidePath:
    """Put a fresh side network, drawn from torch's current random state, beside the trunk of a split model.

    To be called after `get_peft_model`, which would freeze it. Without an adapter, the ladder alone is
    trained.

    Raises `UsageError` when the cloud offers no projection, or the shape makes no sense.
    """
    parts = FrozenParts.of(_base(model))
    trunk = range(len(parts.bottom), card.num_blocks - len(parts.top))
    if taps < 0 or width < 1 or width % (2 * heads):
        raise UsageError(
            f"A ladder of width {width} cannot have {heads} heads.",
            cure="Choose a multiple of twice the heads.",
        )
    blocks = choose_taps(trunk, min(taps, card.tap_offer.max_taps)) if taps else ()
    if taps and not (blocks and card.tap_offer.projections):
        raise UsageError(
            "This cloud offers no projection of its taps.",
            cure="Its operator starts it with --projection-text FILE; or set side.taps to 0.",
        )
    offer = card.tap_offer.projections[0] if taps else None
    plan = SidePlan(
        fingerprint=card.fingerprint,
        cut=split_cut(model),
        hidden_size=card.hidden_size,
        taps=blocks,
        tap_size=offer.size if offer else 0,
        projection=offer.sha256 if offer else "",
        width=width,
        heads=heads,
    )
    return plan_side(model, plan)


def plan_side(model: PreTrainedModel | PeftModel, plan: SidePlan) -> SidePath:
    """Put a side network of a plan beside the trunk of a model of its cut.

    Raises `UsageError` when there is one already.
    """
    parts = FrozenParts.of(_base(model))
    if parts.trunk.shortcut is not None:
        raise UsageError("This model has a side network or a cache already.", cure="Load the model again.")
    ladder = None
    if plan.taps:
        ladder = Ladder(plan.hidden_size, plan.taps, plan.tap_size, plan.width, plan.heads).to(parts.device)
    parts.trunk.ladder = ladder
    return SidePath(parts, plan, ladder, _base(model).dtype)


def split_cut(model: PreTrainedModel | PeftModel) -> str:
    """The cut of a split model, "k:m"."""
    parts = FrozenParts.of(_base(model))
    return str(Cut(len(parts.bottom), len(parts.top)))


def side_of(model: PreTrainedModel | PeftModel) -> SidePath | None:
    """The side path of a model, if it has one."""
    try:
        shortcut = FrozenParts.of(_base(model)).trunk.shortcut
    except UsageError:
        return None  # not split
    return shortcut if isinstance(shortcut, SidePath) else None


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base
