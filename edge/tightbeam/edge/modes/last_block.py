"""The last block's MLP runs only for rows that the head reads.

As keys and values a row of the last block serves every token after it, so attention needs them all. What
follows works row by row and ends in the logits of that row: where none are asked for, it is left out.

K = rows that the head reads, M = rows, D = hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from tightbeam.common.backbone import FAMILIES, dissect

__all__ = ["last_mlp", "left_out", "mlp_only_for"]


def last_mlp(model: PreTrainedModel) -> nn.Module | None:
    """The MLP of the last block; None where it is not known to work row by row and to be a module."""
    mlp = getattr(dissect(model).blocks[-1], "mlp", None)
    known = model.config.get_text_config().model_type in FAMILIES
    return mlp if known and isinstance(mlp, nn.Module) else None


@contextmanager
def left_out(model: PreTrainedModel, mlp: nn.Module) -> Iterator[None]:
    """Take the MLP out of the model, for what is counted inside."""
    block = dissect(model).blocks[-1]
    block.mlp = nn.Identity()
    try:
        yield
    finally:
        block.mlp = mlp


@contextmanager
def mlp_only_for(mlp: nn.Module | None, row_K: Tensor) -> Iterator[None]:
    """Let an MLP compute these rows of `[1, M, D]` alone; the others come out as zeros."""
    if mlp is None:
        yield
        return
    rows, num_rows = row_K.unique(), 0

    def narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal num_rows
        num_rows = args[0].shape[1]
        return (args[0].index_select(1, rows), *args[1:])

    def widen(module: nn.Module, args: tuple[Tensor, ...], out_1KD: Tensor) -> Tensor:
        blank_1MD = out_1KD.new_zeros(1, num_rows, out_1KD.shape[2])
        return blank_1MD.index_copy(1, rows, out_1KD)

    hooks = [mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
