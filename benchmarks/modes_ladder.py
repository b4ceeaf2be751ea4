"""A ladder of mode `side` that starts from backbone weights, for modes.py: tried beside the random start.

LST (arXiv 2206.06522) starts its side blocks from pruned blocks of the backbone. An edge holds those of
bottom and top only, so the lower half of the ladder starts from the bottom's and the upper half from the
top's. Each is restricted to the leading principal directions of the frozen hidden states (`space_WD`, which
also makes the way in and, through the projection's inverse, those from the taps): its heads and neurons of
largest weights stay, queries and keys in the frequencies nearest to the ladder's. Then each rung is scaled to
add a fifth of the stream. The last matrix stays zero.

N = tokens, D = hidden size, W = width of the ladder.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tightbeam.common.backbone import Projection, SegmentTable
from tightbeam.edge.side import Ladder

__all__ = ["start_from_backbone"]

SHARE = 0.2  # of the stream, that a rung's attention and its SwiGLU each add


@torch.no_grad()
def start_from_backbone(
    ladder: Ladder,
    sources: Sequence[nn.Module],
    frozen: Mapping[int, Tensor],
    cut: int,
    projection: Projection,
    table: SegmentTable,
) -> None:
    """Overwrite a fresh ladder, from a block per rung.

    `frozen` holds hidden states `[N, D]` of some texts: after block `cut`, which feeds the ladder, after the
    tapped blocks and after the trunk.
    """
    states = {block: rows_ND.float() for block, rows_ND in frozen.items()}
    rows_ND = torch.cat([rows_ND / rows_ND.norm(dim=1, keepdim=True) for rows_ND in states.values()])
    width, size = ladder.enter.weight.shape
    space_WD = torch.linalg.svd(rows_ND, full_matrices=False).Vh[:width]
    gain = math.sqrt(size / width)  # what has mean square 1 in D elements has it in W again
    ladder.enter.weight.copy_(space_WD * gain)
    tapped = [int(name) for name in ladder.up.keys()]  # noqa: SIM118  a module, not a dict
    for block in tapped:
        back_PD = torch.linalg.pinv(projection.bases[block])
        typical = states[block].norm(dim=1).median() / math.sqrt(size)  # a mean would be the first tokens'
        ladder.up.get_parameter(f"{block}.weight").copy_((back_PD @ space_WD.T).T * gain / typical)
    taps_NP = [projection(block, states[block]) for block in tapped]
    for stage, source in zip(ladder.rungs(), sources, strict=True):
        _restrict(stage, source, space_WD, gain)
        for linear in (stage.mix, stage.down):
            _calibrate(ladder, stage, linear, (states[cut], taps_NP, table))


def _restrict(stage: Any, block: Any, space_WD: Tensor, gain: float) -> None:
    """A stage's weights from those of a Llama block."""
    attention, mlp = block.self_attn, block.mlp
    in_mix, in_mlp = (
        norm.weight[:, None] * space_WD.T * gain
        for norm in (block.input_layernorm, block.post_attention_layernorm)
    )
    q, k, v = (_weight(getattr(attention, f"{name}_proj")) @ in_mix for name in "qkv")
    own, theirs = stage.qkv.weight.shape[1] // stage.heads, attention.head_dim
    q_HEW, k_GEW, v_GEW = (matrix.view(-1, theirs, matrix.shape[1]) for matrix in (q, k, v))
    k_HEW, v_HEW = (m.repeat_interleave(len(q_HEW) // len(m), 0) for m in (k_GEW, v_GEW))
    out_HWE = (space_WD @ _weight(attention.o_proj)).view(len(space_WD), -1, theirs).transpose(0, 1)
    through_HWW = out_HWE @ v_HEW
    heads = through_HWW.norm(dim=(1, 2)).topk(stage.heads).indices
    pairs = torch.arange(own // 2) * theirs // own  # rotary frequencies fall by the place in the head
    dims = torch.cat([pairs, pairs + theirs // 2])
    scale = (theirs / own) ** 0.25  # of queries and keys each: as large products from fewer terms
    u_HWE, s_HE, vh_HEW = torch.linalg.svd(through_HWW[heads], full_matrices=False)
    root_HE = s_HE[:, :own].sqrt()
    values_HEW = root_HE[:, :, None] * vh_HEW[:, :own]
    parts = (q_HEW[heads][:, dims] * scale, k_HEW[heads][:, dims] * scale, values_HEW)
    stage.qkv.weight.copy_(torch.cat([part.flatten(0, 1) for part in parts]))
    stage.mix.weight.copy_((u_HWE[:, :, :own] * root_HE[:, None]).transpose(0, 1).flatten(1))
    gate, up = (_weight(linear) @ in_mlp for linear in (mlp.gate_proj, mlp.up_proj))
    down = space_WD @ _weight(mlp.down_proj)
    neurons = (down.norm(dim=0) * up.norm(dim=1) * gate.norm(dim=1)).topk(stage.down.weight.shape[1]).indices
    stage.gate_up.weight.copy_(torch.cat([gate[neurons], up[neurons]]))
    stage.down.weight.copy_(down[:, neurons])


def _calibrate(ladder: Ladder, stage: nn.Module, linear: nn.Linear, inputs: tuple[Any, ...]) -> None:
    """Scale a matrix so that it adds `SHARE` of what enters its stage."""
    seen: dict[str, Tensor] = {}
    hooks = (
        stage.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0])),
        linear.register_forward_hook(lambda _, __, out: seen.update(added=out)),
    )
    ladder(*inputs)
    for hook in hooks:
        hook.remove()
    linear.weight.mul_(SHARE * seen["stream"].norm() / seen["added"].norm())


def _weight(linear: Any) -> Tensor:
    weight: Tensor = getattr(linear, "base_layer", linear).weight
    return weight.float()
