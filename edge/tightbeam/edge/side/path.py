"""The side path: what the cloud and the cache see stays frozen, what is trained goes around the trunk.

Without their adapters and in evaluation mode the bottom blocks give the cut activations, which never change:
they cross, once a sample, and a cache keeps the answer, and them beside it. With their adapters the bottom
blocks give what the top is to see; where they have none they run only for samples that are not kept. The top
blocks get

    trunk(frozen)  +  (adapted - frozen)  +  ladder(adapted, taps)

The middle term is the residual stream: what a block adds below the trunk would reach the top through it.
Every gradient stays at the edge, and at step 0 both changes are zero, so the model is the backbone.

N = tokens, M = rows (N unless tokens share some), D = hidden size, W = D and the width of all taps.
"""

import hashlib
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

from tightbeam.common.backbone import Cut, Segments, SegmentTable, Taps
from tightbeam.common.errors import UsageError
from tightbeam.common.wire.codecs import codec
from tightbeam.edge.cache.rows import storage_codec, unpack_entry
from tightbeam.edge.cache.shortcut import FrozenParts, Lookup, TrunkShortcut
from tightbeam.edge.link.stepper import Answer
from tightbeam.edge.side.ladder import Ladder
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

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """Inverse of `facts`, whatever else is there; raises KeyError or TypeError when something is not."""
        known = {field.name: facts[field.name] for field in fields(cls)}
        return cls(**{**known, "taps": tuple(known["taps"])})


class SidePath(TrunkShortcut):
    """Stands behind a `RemoteTrunk` for good; a cache comes and goes."""

    trains_below = True

    def __init__(self, parts: FrozenParts, plan: SidePlan, ladder: Ladder | None, dtype: torch.dtype) -> None:
        self.plan, self.ladder = plan, ladder
        self.keeps_bottom = False  # whether the cache has room for the cut activations too
        self._inside = self._adapted = False
        self._frozen_ND: Tensor | None = None
        self._parameters_of = inspect.signature(parts.owner.forward)
        super().__init__(parts, None, dtype, plan.hidden_size)
        parts.trunk.stepper.taps = plan.asked()

    def remove(self) -> None:
        """Take the side network away; the model is an ordinary split one again."""
        super().remove()
        self.parts.trunk.stepper.taps = None
        self.parts.trunk.ladder = None

    def answer(self, hidden_MD: Tensor, table: SegmentTable) -> Tensor:
        """Input of the top blocks, `[M, D]`, differentiable in the adapted cut activations and the ladder."""
        frozen_MD = hidden_MD if self._frozen_ND is None else table.pick(self._frozen_ND.to(table.device))
        rows_MW = super().answer(frozen_MD.detach(), table).to(hidden_MD.dtype)
        out_MD, below_MD = rows_MW[:, : self.plan.hidden_size], frozen_MD
        if self._adapted:
            out_MD, below_MD = out_MD + (hidden_MD - frozen_MD), hidden_MD
        if self.ladder is not None:
            taps_MP = rows_MW[:, self.plan.hidden_size :].split(self.plan.tap_size, dim=1)
            out_MD = out_MD + self.ladder(below_MD, taps_MP, table)
        return out_MD

    def runs_bottom(self, digests: list[bytes]) -> bool:
        """Whether a step on these samples runs the bare bottom, or just has."""
        if self.cache is None or not (self._adapted_below or self.ladder is not None):
            return super().runs_bottom(digests)
        kept = all(_below(digest) in self.cache for digest in digests)
        return not kept or super().runs_bottom(digests)

    def answer_bytes(self, num_tokens: int) -> int:
        """Most that a sample's answer takes in a cache, sealing aside."""
        names = {width: storage_codec(self._wire_codec, torch.float32, width) for width in self._widths()}
        return sum(5 + codec(names[width]).num_bytes((num_tokens, width)) for width in self._widths())

    def bottom_bytes(self, num_tokens: int) -> int:
        """What a sample's cut activations take there."""
        return num_tokens * self.plan.hidden_size * self._dtype.itemsize

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
        for child in module.children():
            if child is not self.parts.blocks:
                child.eval()
        self._adapted = self._adapted_below
        if not self._adapted:
            _require_frozen(below)
            for part in below:
                part.eval()
        self._lookup = lookup = self._find(args, kwargs)
        self._bottom_ran_on = []
        if self._adapted or self.ladder is not None or not self._answered:
            self._frozen_ND = self._kept(lookup)
            if self._frozen_ND is None:
                self._frozen_ND = self._run_bottom(lookup, inputs)
        if not self._adapted:
            self._leave_bottom_out()

    def _after(self, module: nn.Module, args: object, output: object) -> None:
        if not self._inside:
            self._frozen_ND = None
            super()._after(module, args, output)

    @property
    def _adapted_below(self) -> bool:
        return any(isinstance(inner, BaseTunerLayer) for part in self.parts.below for inner in part.modules())

    def _kept(self, lookup: Lookup | None) -> Tensor | None:
        """The cut activations of a forward's samples, `[N, D]`; None when the cache lacks some."""
        if lookup is None or self.cache is None:
            return None
        found = [self.cache.get(_below(digest)) for digest in lookup.digests]
        if any(entry is None for entry in found):
            return None
        rows = torch.frombuffer(bytearray(b"".join(e for e in found if e is not None)), dtype=self._dtype)
        return rows.view(-1, self.plan.hidden_size)

    def _run_bottom(self, lookup: Lookup | None, inputs: dict[str, Any]) -> Tensor:
        """The cut activations, `[N, D]`; kept for samples whose answer is kept."""
        frozen_ND = self.cut_activations(**inputs)[0]
        if lookup is None or self.cache is None:
            return frozen_ND
        self._bottom_ran_on = lookup.digests
        for digest, (start, stop) in zip(lookup.digests, lookup.segments.bounds, strict=True):
            if self.keeps_bottom and digest in self.cache:
                rows = frozen_ND[start:stop].cpu().contiguous().view(torch.uint8)
                self.cache.put(_below(digest), rows.numpy().tobytes())
        return frozen_ND

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


def _below(digest: bytes) -> bytes:
    """What the cache calls a sample's cut activations, beside their answer."""
    return hashlib.sha256(b"cut activations" + digest).digest()


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
