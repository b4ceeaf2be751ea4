"""Does this model run on packed rows? Asked once at load; a model that leaks across segments is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tightbeam.common.backbone.attention import PACKED_ATTENTION
from tightbeam.common.backbone.packing import Segments
from tightbeam.common.backbone.trunk import PackedTrunk
from tightbeam.common.errors import UnsupportedModelError

__all__ = ["SelfTest", "self_test"]

_RAGGED, _EQUAL = (5, 23, 3), (13, 13)
_LONGEST_WINDOW = 4096  # longer ones would take minutes on a CPU; all go through the same argument
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative to the largest value


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What the self-test saw."""

    packed_error: float  # largest difference to the stock model's, relative
    held_bytes_per_token: int  # what autograd keeps for a backward through the span


def self_test(trunk: PackedTrunk, span: range, dtype: torch.dtype) -> SelfTest:
    """Compare packed with plain on random rows, and check that no segment sees another's change.

    Raises `UnsupportedModelError` with the reason.
    """
    name = type(trunk.model).__name__
    with torch.no_grad():
        error = max(_compare(trunk, lengths, span, dtype, name) for lengths in (_RAGGED, _EQUAL))
        for block, length in _beyond_windows(trunk, span):
            _compare(trunk, (length, 3), range(block, block + 1), dtype, name)
    hidden_ND, segments = _rows(trunk, _RAGGED, dtype)
    with torch.no_grad(), _stock_attention(trunk):
        trunk.run_plain(hidden_ND[None], None, span)
    if not trunk.tells_positions:
        raise UnsupportedModelError(
            f"{name} does not tell its blocks the position_ids, which an edge sends.",
            cure="This architecture cannot be served; choose a tested family.",
        )
    return SelfTest(error, _held_bytes_per_token(trunk, hidden_ND, segments, span))


def _rows(trunk: PackedTrunk, lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Segments]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(sum(lengths), trunk.hidden_size, generator=generator).to(trunk.device(), dtype)
    return hidden_ND, Segments(lengths, torch.cat([torch.arange(n) for n in lengths]))


def _beyond_windows(trunk: PackedTrunk, span: range) -> Iterator[tuple[int, int]]:
    """The first block of each type, and more tokens than its attention window holds."""
    window = getattr(trunk.config, "sliding_window", None)
    if not isinstance(window, int) or not max(_RAGGED) <= window <= _LONGEST_WINDOW:
        return
    kinds = getattr(trunk.config, "layer_types", None) or [None] * trunk.num_blocks
    for kind in dict.fromkeys(kinds[index] for index in span):
        yield next(index for index in span if kinds[index] == kind), window + 7


def _compare(
    trunk: PackedTrunk, lengths: tuple[int, ...], span: range, dtype: torch.dtype, name: str
) -> float:
    """Relative difference of packed rows to unpacked sequences; the first must not reach the others."""
    hidden_ND, segments = _rows(trunk, lengths, dtype)
    packed_ND = _run_packed(trunk, hidden_ND, segments, span, name)
    plain_ND = _run_plain(trunk, hidden_ND, segments, span)
    scale, tolerance = plain_ND.abs().max(), _TOLERANCE[dtype]
    error = float((packed_ND - plain_ND).abs().max() / scale)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{name} gives other results on packed rows (relative difference {error:.1e}).",
            cure="This architecture cannot be served; choose a tested family.",
        )
    changed_ND = hidden_ND.clone()
    changed_ND[: lengths[0]] = float("nan")
    after_ND = _run_packed(trunk, changed_ND, segments, span, name)
    # Not bit by bit: experts compute the tokens that chose them together, and round as many at a time.
    if not float((after_ND - packed_ND)[lengths[0] :].abs().max() / scale) <= tolerance:
        raise UnsupportedModelError(
            f"{name} leaks across packed sequences: one sequence's values changed another's.",
            cure="This architecture cannot be served; choose a tested family.",
        )
    return error


def _run_packed(trunk: PackedTrunk, hidden_ND: Tensor, segments: Segments, span: range, name: str) -> Tensor:
    try:
        return trunk.run(hidden_ND, segments, span)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{name} does not run with a custom attention function: {type(error).__name__}: {error}",
            cure="This architecture cannot be served; choose a tested family.",
        ) from error


def _run_plain(trunk: PackedTrunk, hidden_ND: Tensor, segments: Segments, span: range) -> Tensor:
    """Each sequence in a row of its own, padded on the right: the longest may decide on rotary embeddings."""
    hidden_STD = torch.nn.utils.rnn.pad_sequence(list(hidden_ND.split(segments.lengths)), batch_first=True)
    positions_ST = torch.arange(hidden_STD.shape[1]).expand(hidden_STD.shape[:2])
    with _stock_attention(trunk):
        out_STD = trunk.run_plain(hidden_STD, positions_ST, span)
    return torch.cat([out_TD[:length] for out_TD, length in zip(out_STD, segments.lengths, strict=True)])


@contextmanager
def _stock_attention(trunk: PackedTrunk) -> Iterator[None]:
    softcapped = getattr(trunk.config, "attn_logit_softcapping", None) is not None
    trunk.set_attention("eager" if softcapped or not trunk.model._supports_sdpa else "sdpa")
    try:
        yield
    finally:
        trunk.set_attention(PACKED_ATTENTION)


def _held_bytes_per_token(trunk: PackedTrunk, hidden_ND: Tensor, segments: Segments, span: range) -> int:
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out_ND = trunk.run(hidden_ND.clone().requires_grad_(), segments, span)
    weights = {
        p.untyped_storage().data_ptr() for block in trunk.blocks for p in block.parameters() if not p.is_meta
    }
    held = sum(size for pointer, size in seen.items() if pointer not in weights)
    del out_ND
    return held // segments.num_tokens + 1
