"""The remote thing behaves like the local thing: an `nn.Module` in block k's place whose backward works.

Padding never crosses. After the trunk it is zeros, so what the model puts out *at* padding differs from the
whole model, where it is noise; what it puts out at tokens does not.

B = batch, T = padded length, N = real tokens, M = rows (N unless tokens share some), D = hidden size.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig

from tightbeam.common.accounts.rows import Purpose
from tightbeam.common.backbone import Packer, Segments, SegmentTable, VaryingRope
from tightbeam.common.errors import UsageError
from tightbeam.edge.link.stepper import Stepper
from tightbeam.edge.model.calls import current_mask

__all__ = ["PassThrough", "RemoteTrunk", "Shortcut", "through_cloud"]


class Shortcut(Protocol):
    """Answers for a trunk whose input never changes, from what the cloud said before."""

    trains_below: bool  # whether what is trained below the cut has another way than through the trunk

    def answer(self, hidden_MD: Tensor, table: SegmentTable) -> Tensor:
        """Hidden states after the trunk, `[M, D]`; differentiable only if something is trained below."""
        ...


class RemoteTrunk(nn.Module):
    """Runs blocks `[k, L-m)` in the cloud. Called by the model like one of its own blocks."""

    def __init__(self, stepper: Stepper, config: PretrainedConfig, attention_type: str | None = None) -> None:
        super().__init__()
        self.stepper, self.config = stepper, config
        self.attention_type = attention_type  # some models ask their blocks for it
        self.shortcut: Shortcut | None = None
        self.ladder: nn.Module | None = None  # of mode side: here, the model's parameters include it
        self.rope: VaryingRope | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it bare
    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states after the trunk, `[B, T, D]`; zeros at padding."""
        batch, length = hidden_BTD.shape[:2]
        mask_BT, positions_BT = current_mask(), kwargs["position_ids"].expand(batch, length)
        if mask_BT is None:
            self._check_borders(positions_BT, *args, *kwargs.values())
        packer = Packer((batch, length), mask_BT, positions_BT)
        hidden_ND, longest = packer.pack(hidden_BTD), self.rope.longest(positions_BT) if self.rope else 0
        if self.shortcut is None:
            return packer.unpack(self._cross(hidden_ND, packer.segments, longest))
        if torch.is_grad_enabled() and hidden_ND.requires_grad and not self.shortcut.trains_below:
            raise UsageError(
                "Something below the cut is trained, so the trunk cannot answer from a cache.",
                cure="Freeze the bottom, its embeddings and adapters included, or use mode ushape.",
            )
        if longest:
            raise UsageError(
                f"In a batch of {longest} positions the rotary embeddings of this model change for all its "
                "sequences, so the trunk cannot answer from a cache.",
                cure="Lower data.max_length to what the model was first trained with, or use mode ushape.",
            )
        table = kwargs.get("segments")  # of a caller who packs, and may let tokens share rows
        if not isinstance(table, SegmentTable):
            table = SegmentTable(packer.segments, hidden_ND.device)
        out_ND = self.shortcut.answer(hidden_ND, table)
        return packer.unpack(out_ND.to(hidden_ND.device, hidden_ND.dtype))

    def _cross(self, hidden_ND: Tensor, segments: Segments, longest: int) -> Tensor:
        """Through the cloud; where padding decides on rotary embeddings, one row stands for it."""
        if longest <= int(segments.positions_N.max()) + 1:
            return through_cloud(hidden_ND, self.stepper, segments)
        positions_N = torch.cat([segments.positions_N, torch.tensor([longest - 1])])
        with_padding = Segments((*segments.lengths, 1), positions_N)
        return through_cloud(nn.functional.pad(hidden_ND, (0, 0, 0, 1)), self.stepper, with_padding)[:-1]

    def _check_borders(self, positions_BT: Tensor, *arguments: object) -> None:
        """Sequences packed into one row must be apart in the edge's blocks too, as they are in the trunk."""
        borders_R2 = (positions_BT.diff(dim=1) != 1).nonzero()
        if not len(borders_R2):
            return
        row, column = borders_R2[0].tolist()
        dense = next((x for x in arguments if isinstance(x, Tensor) and x.dim() == 4), None)
        if dense is None:
            apart = self.config._attn_implementation not in ("sdpa", "eager")  # others part them by positions
        else:
            cell = dense[min(row, len(dense) - 1), 0, column + 1, column]
            apart = float(cell) == 0.0 if cell.dtype is torch.bool else float(cell) < 0.0
        if not apart:
            raise UsageError(
                "Sequences are packed into one row, and this model's blocks would let them see each other.",
                cure="Pad them and pass attention_mask, instead of packing or padding_free.",
            )


class PassThrough(nn.Module):
    """In every other trunk block's place, so that the blocks that stay keep index and parameter names."""

    def __init__(self, attention_type: str | None = None) -> None:
        super().__init__()
        self.attention_type = attention_type

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states as they came."""
        return hidden_BTD


def through_cloud(hidden_ND: Tensor, stepper: Stepper, segments: Segments) -> Tensor:
    """Hidden states after the trunk, `[N, D]`; differentiable in `hidden_ND`: a `Trunk` over the wire."""
    # Asked here, because autograd turns gradients off inside its functions.
    purpose: Purpose = "train" if torch.is_grad_enabled() else "evaluate"
    crossing_ND = (
        hidden_ND.float() if hidden_ND.dtype is torch.float64 else hidden_ND
    )  # no codec carries more
    out_ND: Tensor = _CloudSpan.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` bare
        crossing_ND, stepper, segments, purpose
    )
    return out_ND.to(hidden_ND.dtype)


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
