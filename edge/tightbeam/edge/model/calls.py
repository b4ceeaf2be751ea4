"""What one call of the split model says above its blocks: the attention mask, and what cannot be had.

Blocks get a dense mask only, and packing needs the 2-D one. It is kept per thread: several may use one model.

B = batch, T = padded length.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tightbeam.common.backbone import Anatomy
from tightbeam.common.errors import DataError, UsageError

__all__ = ["current_mask", "watch_calls"]

_MASK_BT: ContextVar[Tensor | None] = ContextVar("mask_BT", default=None)
_IGNORED = -100  # what a label is where nothing is learned


def current_mask() -> Tensor | None:
    """The attention mask `[B, T]` of the call under way in this thread."""
    return _MASK_BT.get()


def watch_calls(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Note the mask of every call, refuse what a split model cannot do, and labels that nothing predicts."""
    watch = _Watch(inspect.signature(anatomy.trunk_owner.forward))
    anatomy.trunk_owner.register_forward_pre_hook(watch.note, with_kwargs=True)
    model.loss_function = _learns_from_tokens(model.loss_function)


class _Watch:
    """The hook of one model."""

    def __init__(self, signature: inspect.Signature) -> None:
        self._signature = signature

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it bare
    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's own forward."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        past, mask = given.get("past_key_values"), given.get("attention_mask")
        if past is not None and past.get_seq_length() > 0:
            raise UsageError(
                "A key/value cache does not reach into the cloud.",
                cure="Call generate(input_ids, use_cache=False): from inputs_embeds transformers always makes"
                " one. Prefix tuning, which trains such a cache, needs the whole model: use LoRA, IA3 or"
                " prompt tuning.",
            )
        for name in ("output_hidden_states", "output_attentions"):
            if given.get("kwargs", {}).get(name, given.get(name, getattr(module.config, name, False))):
                raise UsageError(
                    f"{name} cannot be had: those of the trunk's blocks stay in the cloud.",
                    cure=f"Leave out {name}; a forward hook sees what a block at the edge puts out.",
                )
        if mask is not None:
            _check_mask(mask, windowed=bool(getattr(module.config, "sliding_window", None)))
        _MASK_BT.set(mask)


def _check_mask(mask: object, *, windowed: bool) -> None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UsageError(
            "The split model takes a 2-D attention mask [batch, length].",
            cure="Pass the tokenizer's attention_mask; 4-D masks cannot be sent as packed rows.",
        )
    if not bool(mask.any()):
        raise UsageError("The attention mask covers the whole batch.", cure="Leave out empty batches.")
    if windowed and _has_holes(mask):
        raise UsageError(
            "This model's attention window counts masked tokens, which are not sent.",
            cure="Mask only padding at either end of a sequence.",
        )


def _has_holes(mask_BT: Tensor) -> bool:
    edges_BT = nn.functional.pad(mask_BT.bool(), (1, 1)).int().diff(dim=1).abs()
    return bool((edges_BT.sum(1) > 2).any())


def _learns_from_tokens(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`loss`, but it refuses labels that padding would have to predict: the cloud computes nothing there."""

    @functools.wraps(loss)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_labels(kwargs.get("labels", args[1] if len(args) > 1 else None), kwargs.get("shift_labels"))
        return loss(*args, **kwargs)

    return checked


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it bare
def _check_labels(labels_BT: Tensor | None, shifted_BT: Tensor | None) -> None:
    mask_BT = current_mask()
    if shifted_BT is None and labels_BT is not None:
        shifted_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=_IGNORED)
    if mask_BT is None or shifted_BT is None or shifted_BT.shape != mask_BT.shape:
        return
    wrong_R2 = ((shifted_BT != _IGNORED) & (mask_BT == 0).to(shifted_BT.device)).nonzero()
    if len(wrong_R2):
        row, column = wrong_R2[0].tolist()
        raise DataError(
            f"Padding would have to predict the label at token {column + 1} of row {row} of the batch, "
            "and padding is not sent.",
            cure="Pad on the right and make labels -100 at padding, as TRL's collators do; or leave out "
            "attention_mask, so that padding is text to learn.",
        )
