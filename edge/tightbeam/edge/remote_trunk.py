"""The remote thing behaves like the local thing: an `nn.Module` in block k's place whose backward works.

Padding never crosses. After the trunk it is zeros, so what the model puts out *at* padding differs from the
whole model, where it is noise; what it puts out at tokens does not.

B = batch, T = padded length, N = real tokens, M = rows (N unless tokens share some), D = hidden size.
"""

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tightbeam.common.backbone import Anatomy, Packer, Segments, SegmentTable
from tightbeam.common.costs.rows import Purpose
from tightbeam.common.errors import UsageError
from tightbeam.edge.stepper import Stepper

__all__ = ["PassThrough", "RemoteTrunk", "Shortcut", "through_cloud"]


class Shortcut(Protocol):
    """Answers for a trunk whose input never changes, from what the cloud said before."""

    trains_below: bool  # whether what is trained below the cut has another way than through the trunk

    def answer(self, hidden_MD: Tensor, table: SegmentTable) -> Tensor:
        """Hidden states after the trunk, `[M, D]`; differentiable only if something is trained below."""
        ...


class RemoteTrunk(nn.Module):
    """Runs blocks `[k, L-m)` in the cloud. Called by the model like one of its own blocks."""

    def __init__(self, stepper: Stepper, attention_type: str | None = None) -> None:
        super().__init__()
        self.stepper = stepper
        self.attention_type = attention_type  # some models ask their blocks for it
        self.shortcut: Shortcut | None = None
        self.ladder: nn.Module | None = None  # of mode side: here, the model's parameters include it
        self._mask_BT: Tensor | None = None

    def watch(self, anatomy: Anatomy) -> None:
        """Note the 2-D attention mask of every forward: blocks only get a dense one, and packing needs it."""
        self._signature = inspect.signature(anatomy.trunk_owner.forward)
        config: Any = anatomy.trunk_owner.config
        self._windowed = bool(getattr(config, "sliding_window", None))
        anatomy.trunk_owner.register_forward_pre_hook(self._note_inputs, with_kwargs=True)

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states after the trunk, `[B, T, D]`; zeros at padding."""
        batch, length = hidden_BTD.shape[:2]
        packer = Packer((batch, length), self._mask_BT, kwargs["position_ids"])
        hidden_ND = packer.pack(hidden_BTD)
        if self.shortcut is None:
            return packer.unpack(through_cloud(hidden_ND, self.stepper, packer.segments))
        if torch.is_grad_enabled() and hidden_ND.requires_grad and not self.shortcut.trains_below:
            raise UsageError(
                "Something below the cut is trained, so the trunk cannot answer from a cache.",
                cure="Freeze the bottom, its embeddings and adapters included, or use mode ushape.",
            )
        table = kwargs.get("segments")  # of a caller who packs, and may let tokens share rows
        if not isinstance(table, SegmentTable):
            table = SegmentTable(packer.segments, hidden_ND.device)
        out_ND = self.shortcut.answer(hidden_ND, table)
        return packer.unpack(out_ND.to(hidden_ND.device, hidden_ND.dtype))

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        past, mask = given.get("past_key_values"), given.get("attention_mask")
        if past is not None and past.get_seq_length() > 0:
            raise UsageError(
                "A key/value cache does not reach into the cloud.",
                cure="Call generate(..., use_cache=False). Prefix tuning, which trains such a cache, needs "
                "the whole model: use LoRA, IA3 or prompt tuning.",
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UsageError(
                "The split model takes a 2-D attention mask [batch, length].",
                cure="Pass the tokenizer's attention_mask; 4-D masks cannot be sent as packed rows.",
            )
        if mask is not None and not bool(mask.any()):
            raise UsageError("The attention mask covers the whole batch.", cure="Leave out empty batches.")
        if mask is not None and self._windowed and _has_holes(mask):
            raise UsageError(
                "This model's attention window counts masked tokens, which are not sent.",
                cure="Mask only padding at either end of a sequence.",
            )
        self._mask_BT = mask


class PassThrough(nn.Module):
    """In every other trunk block's place, so that the blocks that stay keep index and parameter names."""

    def __init__(self, attention_type: str | None = None) -> None:
        super().__init__()
        self.attention_type = attention_type

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states as they came."""
        return hidden_BTD


def _has_holes(mask_BT: Tensor) -> bool:
    edges_BT = torch.nn.functional.pad(mask_BT.bool(), (1, 1)).int().diff(dim=1).abs()
    return bool((edges_BT.sum(1) > 2).any())


def through_cloud(hidden_ND: Tensor, stepper: Stepper, segments: Segments) -> Tensor:
    """Hidden states after the trunk, `[N, D]`; differentiable in `hidden_ND`: a `Trunk` over the wire."""
    # Asked here, because autograd turns gradients off inside its functions.
    purpose: Purpose = "train" if torch.is_grad_enabled() else "evaluate"
    out_ND: Tensor = _CloudSpan.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` bare
        hidden_ND, stepper, segments, purpose
    )
    return out_ND


class _CloudSpan(torch.autograd.Function):
    """The trunk on packed rows; its gradient comes from the cloud too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        stepper: Stepper,
        segments: Segments,
        purpose: Purpose,
    ) -> Tensor:
        keep = bool(ctx.needs_input_grad[0])
        out_ND, ctx.inputs = stepper.forward(hidden_ND, segments, keep=keep, purpose=purpose)
        ctx.stepper = stepper
        return out_ND.to(hidden_ND.device, hidden_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        grad_input_ND = ctx.stepper.backward(ctx.inputs, grad_ND)
        return grad_input_ND.to(grad_ND.device, grad_ND.dtype), None, None, None
