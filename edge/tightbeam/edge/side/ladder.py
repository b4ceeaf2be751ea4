"""The ladder: a narrow transformer beside the trunk, fed by its taps and trained at the edge.

After Ladder Side-Tuning (arXiv 2206.06522) with QST's wider ends (arXiv 2401.07159):

    x = in(norm(cut activations))
    for each tap:  x = stage(2 (g x + (1 - g) up(tap)))        g = sigmoid of a trained scalar, at first 1/2
    change = out(norm(x))                                      added to the input of the top blocks

`out` starts at zero, so step 0 is the backbone. A stage is pre-norm causal attention with rotary positions
and a SwiGLU. Nothing runs backward through the trunk: a tap is a constant.

N = rows, D = hidden size of the backbone, W = width of the ladder, P = elements of a tap.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tightbeam.common.backbone import SegmentTable, packed_attention

__all__ = ["Ladder", "side_parameters"]

_ROPE_BASE = 1e4
_MLP = 3  # inner width of a stage's SwiGLU, in widths


class Ladder(nn.Module):
    """Maps cut activations and taps to a change of the trunk's output. Computes in float32."""

    def __init__(self, hidden_size: int, taps: Iterable[int], tap_size: int, width: int, heads: int) -> None:
        super().__init__()
        names = [str(block) for block in taps]
        self.head_size = width // heads
        self.norm_in = nn.RMSNorm(hidden_size)
        self.enter = nn.Linear(hidden_size, width, bias=False)
        # Dicts, not lists: a list as long as the backbone has blocks would be taken for its blocks.
        self.up = nn.ModuleDict({name: nn.Linear(tap_size, width, bias=False) for name in names})
        self.stages = nn.ModuleDict({name: _Stage(width, heads) for name in names})
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})
        self.norm_out = nn.RMSNorm(width)
        self.leave = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(self, cut_ND: Tensor, taps_NP: Iterable[Tensor], table: SegmentTable) -> Tensor:
        """The change `[N, D]` in the dtype of `cut_ND`; taps in the order of their blocks."""
        turn_NE = self._rotary(table.row_positions)
        x_NW = self.enter(self.norm_in(cut_ND.float()))
        for (name, stage), tap_NP in zip(self.stages.items(), taps_NP, strict=True):
            share = torch.sigmoid(self.gates[name])
            mixed_NW = share * x_NW + (1 - share) * self.up[name](tap_NP.float())
            x_NW = stage(2 * mixed_NW, turn_NE, table)
        change_ND: Tensor = self.leave(self.norm_out(x_NW))
        return change_ND.to(cut_ND.dtype)

    def rungs(self) -> "list[_Stage]":
        """The stages, from the first tap to the last."""
        return [stage for stage in self.stages.values() if isinstance(stage, _Stage)]

    def _rotary(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        exponent = torch.arange(0, self.head_size, 2, device=positions_N.device) / self.head_size
        angle_NE = positions_N[:, None] * _ROPE_BASE**-exponent
        angle_NE = torch.cat([angle_NE, angle_NE], dim=-1)
        return angle_NE.cos(), angle_NE.sin()


class _Stage(nn.Module):
    """One rung: attention within segments, then a SwiGLU, both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_mix, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * _MLP * width, bias=False)
        self.down = nn.Linear(_MLP * width, width, bias=False)

    def forward(self, x_NW: Tensor, turn_NE: tuple[Tensor, Tensor], table: SegmentTable) -> Tensor:
        qkv_N3HE = self.qkv(self.norm_mix(x_NW)).view(len(x_NW), 3, self.heads, -1)
        q, k, v = qkv_N3HE.permute(1, 2, 0, 3)[:, None]  # [1, H, N, E] each
        mixed_1NHE, _ = packed_attention(self, _turn(q, turn_NE), _turn(k, turn_NE), v, None, segments=table)
        x_NW = x_NW + self.mix(mixed_1NHE.reshape(len(x_NW), -1))
        gate, up = self.gate_up(self.norm_mlp(x_NW)).chunk(2, dim=-1)
        out_NW: Tensor = x_NW + self.down(silu(gate) * up)
        return out_NW


def _turn(z_1HNE: Tensor, turn_NE: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn_NE
    first, second = z_1HNE.chunk(2, dim=-1)
    return (z_1HNE * cos + torch.cat([-second, first], dim=-1) * sin).to(z_1HNE.dtype)


def side_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model's ladder by name; empty without one. PEFT does not save them."""
    for module in model.modules():
        if isinstance(module, Ladder):
            return dict(module.named_parameters())
    return {}
