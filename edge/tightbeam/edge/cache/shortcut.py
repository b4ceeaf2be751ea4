"""A frozen bottom and trunk answer from the cache, and the bottom is left out when nothing is missing.

Nothing trainable lies at or below the cut, so a sample's activation after the trunk is the same in every
epoch. `TrunkShortcut` hooks the module that iterates over the blocks: before each forward it looks up every
sample. If all are held, the bottom blocks are passed through and the trunk's answer is read; otherwise the
bottom runs and the missing samples alone go to the cloud. A stock `Trainer` or `generate()` works through it
unchanged.

A forward in training mode keeps what it fetched; one in evaluation mode only reads, so that the prefixes that
`generate()` makes do not fill the cache. B = batch, T = padded length, N = tokens, D = hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tightbeam.common.accounts.rows import Purpose
from tightbeam.common.backbone import Packer, Segments, SegmentTable, dissect
from tightbeam.common.errors import CodecError, UsageError
from tightbeam.edge.cache.keys import Scope, sample_digest
from tightbeam.edge.cache.rows import pack_entry, unpack_entry
from tightbeam.edge.cache.store import ActivationCache
from tightbeam.edge.link.stepper import Answer
from tightbeam.edge.model.remote_trunk import PassThrough, RemoteTrunk

__all__ = ["FrozenParts", "Lookup", "TrunkShortcut", "add_noise", "bottom_output", "passed_through"]


@dataclass(frozen=True, slots=True)
class FrozenParts:
    """Where a split model has its trunk, and what lies below."""

    owner: nn.Module  # iterates over the blocks
    blocks: nn.ModuleList
    trunk: RemoteTrunk
    bottom: range
    top: range

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FrozenParts":
        """Raises `UsageError` for a model that is not split."""
        anatomy = dissect(model)
        places = [i for i, block in enumerate(anatomy.blocks) if isinstance(block, RemoteTrunk)]
        if not places:
            raise UsageError(
                "This model has no trunk in a cloud.", cure="Take the one that load_model() gave."
            )
        trunk = anatomy.blocks[places[0]]
        assert isinstance(trunk, RemoteTrunk)
        last = max(
            i for i, block in enumerate(anatomy.blocks) if isinstance(block, RemoteTrunk | PassThrough)
        )
        top = range(last + 1, len(anatomy.blocks))
        return cls(anatomy.trunk_owner, anatomy.blocks, trunk, range(places[0]), top)

    @property
    def below(self) -> list[nn.Module]:
        """What runs before the trunk: embeddings and bottom blocks."""
        children = self.owner.named_children()
        embedding = [child for name, child in children if name == "project_in" or _embeds(child)]
        return [*embedding, *(self.blocks[i] for i in self.bottom)]

    @property
    def device(self) -> torch.device:
        """Where the edge's blocks are."""
        return next(p.device for p in self.owner.parameters() if not p.is_meta)

    def scope(self, fingerprint: str, cut: str, bottom_sha256: str, dtype: torch.dtype, width: int) -> Scope:
        """The cache's scope for this model."""
        codecs = self.trunk.stepper.codecs
        return Scope(
            fingerprint=fingerprint,
            trunk_dtype=self.trunk.stepper.trunk_dtype,
            cut=cut,
            bottom_sha256=bottom_sha256,
            codec_up=codecs.activations_up,
            codec_down=codecs.activations_down,
            dtype=str(dtype).removeprefix("torch."),
            hidden_size=width,
        )


def _embeds(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Embedding) for inner in module.modules())


@contextmanager
def passed_through(blocks: nn.ModuleList, span: range) -> Iterator[None]:
    """Leave blocks out of the forwards made inside; some models ask a block for its attention type."""
    real = [blocks[i] for i in span]
    for i, block in zip(span, real, strict=True):
        blocks[i] = PassThrough(getattr(block, "attention_type", None))
    try:
        yield
    finally:
        for i, block in zip(span, real, strict=True):
            blocks[i] = block


@torch.no_grad()
def bottom_output(parts: FrozenParts, **inputs: Any) -> tuple[Tensor, Segments]:
    """The trunk's input for the model's `inputs`, `[N, D]`: embeddings and bottom blocks only."""
    captured = _Capture()
    before, parts.trunk.shortcut = parts.trunk.shortcut, captured
    try:
        with passed_through(parts.blocks, parts.top):
            parts.owner(**inputs, use_cache=False)
    finally:
        parts.trunk.shortcut = before
    (found,) = captured.inputs
    return found


class _Capture:
    """A shortcut that notes the trunk's input and hands it on unchanged."""

    trains_below = False

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, Segments]] = []

    def answer(self, hidden_MD: Tensor, table: SegmentTable) -> Tensor:
        self.inputs.append((table.spread(hidden_MD), table.segments))
        return hidden_MD


@dataclass(slots=True)
class Lookup:
    """One forward's samples and what the cache has of them."""

    segments: Segments
    input_ids_N: Tensor
    digests: list[bytes]
    held: list[Tensor | None]  # [n, D] each

    def is_of(self, segments: Segments) -> bool:
        """Whether these are the lengths and positions that were looked up."""
        same = torch.equal(segments.positions_N, self.segments.positions_N)
        return segments.lengths == self.segments.lengths and same


class TrunkShortcut:
    """Stands behind a `RemoteTrunk` until `remove()`. Without a cache it fetches everything, every time."""

    trains_below = False

    def __init__(
        self, parts: FrozenParts, cache: ActivationCache | None, dtype: torch.dtype, width: int
    ) -> None:
        self.parts, self.cache = parts, cache
        self.noise = 0.0  # of `add_noise`, in training
        self._dtype, self._width = dtype, width
        self._lookup: Lookup | None = None
        self._bypass: Any = None
        self._bottom_ran_on: list[bytes] = []  # samples of the last forward, if it ran the frozen bottom
        self._hooks = [
            parts.owner.register_forward_pre_hook(self._before, with_kwargs=True),
            parts.owner.register_forward_hook(self._after, always_call=True),
        ]
        parts.trunk.shortcut = self

    @property
    def _wire_codec(self) -> str:
        """Of the stepper that the trunk has now: simulated edges take turns in one model."""
        return self.parts.trunk.stepper.codecs.activations_down

    def remove(self) -> None:
        """Let the trunk go to the cloud again."""
        for hook in self._hooks:
            hook.remove()
        self.parts.trunk.shortcut = None

    def keep(self, answer: Answer, segments: Segments, digests: Sequence[bytes]) -> None:
        """Put a reply into the cache, sample by sample."""
        assert self.cache is not None
        assert answer.codec == self._wire_codec
        bounds = zip(digests, segments.bounds, strict=True)
        self.cache.put_all((digest, self.pack(answer, start, stop)) for digest, (start, stop) in bounds)

    def pack(self, answer: Answer, start: int, stop: int) -> bytes:
        """The cache's entry of rows `start` to `stop` of an answer."""
        return pack_entry(answer.codec, answer.payload, answer.hidden_ND, start, stop)

    def unpack(self, entry: bytes, num_tokens: int) -> Tensor:
        """What `rows` gave for them."""
        return unpack_entry(self._wire_codec, entry, num_tokens, self._width)

    def rows(self, answer: Answer) -> Tensor:
        """The part of an answer that is kept, one row a token."""
        return answer.hidden_ND

    def cut_activations(self, **inputs: Any) -> tuple[Tensor, Segments]:
        """What goes to the cloud for the model's `inputs`, `[N, D]`."""
        return bottom_output(self.parts, **inputs)

    def runs_bottom(self, digests: list[bytes]) -> bool:
        """Whether a step on these samples runs the frozen bottom, or just has; filling ahead aside."""
        return self.cache is None or self._bottom_ran_on == digests

    def answer(self, hidden_MD: Tensor, table: SegmentTable) -> Tensor:
        """Hidden states after the trunk, `[M, D]`."""
        rows_ND = self._answer(table.spread(hidden_MD), table.segments)
        rows_MD = table.pick(rows_ND.to(table.device))
        return add_noise(rows_MD, self.noise) if self.noise and self.parts.owner.training else rows_MD

    def _answer(self, hidden_ND: Tensor, segments: Segments) -> Tensor:
        """Of every token, `[N, D]` on the CPU."""
        lookup = self._lookup
        if lookup is None or (self.cache is None and not lookup.is_of(segments)):
            stepper = self.parts.trunk.stepper
            return self.rows(stepper.collect(stepper.submit(hidden_ND, segments, purpose=_purpose())))
        # The key holds these positions: an activation of others must not pass for this sample's.
        assert lookup.is_of(segments)
        missing = [i for i, rows in enumerate(lookup.held) if rows is None]
        for i, rows in zip(missing, self._fetch(hidden_ND, lookup, missing), strict=True):
            lookup.held[i] = rows
        return torch.cat([rows for rows in lookup.held if rows is not None])

    def _fetch(self, hidden_ND: Tensor, lookup: Lookup, missing: list[int]) -> Sequence[Tensor]:
        if not missing:
            return []
        places = [lookup.segments.bounds[i] for i in missing]
        index = torch.cat([torch.arange(start, stop) for start, stop in places])
        part = Segments(tuple(stop - start for start, stop in places), lookup.segments.positions_N[index])
        stepper = self.parts.trunk.stepper
        part_ND = hidden_ND[index.to(hidden_ND.device)]
        ids_N = lookup.input_ids_N[index]
        answer = stepper.collect(stepper.submit(part_ND, part, purpose=_purpose(), input_ids_N=ids_N))
        if self.cache is not None and torch.is_grad_enabled():
            self.keep(answer, part, [lookup.digests[i] for i in missing])
        rows: Sequence[Tensor] = self.rows(answer).to(self._dtype).split(list(part.lengths))
        return rows

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for child in module.children():
            if child is not self.parts.blocks:
                child.eval()
        for i in self.parts.bottom:
            self.parts.blocks[i].eval()
        self._lookup = lookup = self._find(args, kwargs)
        self._bottom_ran_on = [] if lookup is None or self._answered else lookup.digests
        if self._answered:
            self._leave_bottom_out()

    def _after(self, module: nn.Module, args: object, output: object) -> None:
        bypass, self._bypass, self._lookup = self._bypass, None, None
        if bypass is not None:
            bypass.__exit__(None, None, None)

    @property
    def _answered(self) -> bool:
        """Whether the cache has all samples of this forward."""
        return self._lookup is not None and all(rows is not None for rows in self._lookup.held)

    def _leave_bottom_out(self) -> None:
        self._bypass = passed_through(self.parts.blocks, self.parts.bottom)
        self._bypass.__enter__()

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lookup | None:
        """A forward's samples, and what the cache has of them; None when it cannot tell."""
        if self.parts.trunk.shortcut is not self:
            return None
        inputs = _sample_inputs(args, kwargs)
        return None if inputs is None else self._look_up(*inputs)

    def _look_up(self, ids_BT: Tensor, mask_BT: Tensor | None, positions_BT: Tensor) -> Lookup:
        packer = Packer((ids_BT.shape[0], ids_BT.shape[1]), mask_BT, positions_BT)
        ids_N, segments = packer.pack(ids_BT[..., None]).flatten().cpu(), packer.segments
        ids, positions = ids_N.tolist(), segments.positions_N.tolist()
        digests = [sample_digest(ids[a:b], positions[a:b]) for a, b in segments.bounds]
        held = [self._read(d, n) for d, n in zip(digests, segments.lengths, strict=True)]
        return Lookup(segments, ids_N, digests, held)

    def _read(self, digest: bytes, num_tokens: int) -> Tensor | None:
        while self.cache is not None and (payload := self.cache.get(digest)) is not None:
            try:
                rows = self.unpack(payload, num_tokens)
            except CodecError:
                rows = None
            if rows is not None and bool(rows.isfinite().all()):
                return rows.to(self._dtype)
            if not self.cache.discard(digest):  # an older version kept whatever a cloud answered
                break
        return None


def add_noise(rows_MD: Tensor, noise: float) -> Tensor:
    """Add Gaussian noise, as NEFTune (arXiv 2310.05914) does to embeddings.

    Its standard deviation is `noise` times that of the rows, their median: a few first tokens are enormous.
    """
    deviation = rows_MD.float().std(dim=1).median()
    return rows_MD + (noise * deviation * torch.randn_like(rows_MD)).to(rows_MD.dtype)


def _purpose() -> Purpose:
    """What a forward outside of a filling is for."""
    return "train" if torch.is_grad_enabled() else "evaluate"


def _sample_inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Token ids, mask and positions of a forward; None when the positions are the model's own secret."""
    ids_BT = kwargs.get("input_ids", args[0] if args else None)
    if ids_BT is None or kwargs.get("past_key_values") is not None:
        return None
    table = kwargs.get("segments")
    if isinstance(table, SegmentTable):
        return table.spread(ids_BT[0])[None], None, table.segments.positions_N[None]
    mask_BT, positions_BT = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if positions_BT is None:
        if mask_BT is not None and not bool(mask_BT[:, 0].all()):
            return None  # models count differently behind padding on the left
        positions_BT = torch.arange(ids_BT.shape[1])[None]
    return ids_BT, mask_BT, positions_BT
