"""Does this model run on packed rows? Asked once at load; a model that leaks across segments is refused."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tightbeam.common.backbone.attention import PACKED_ATTENTION
from tightbeam.common.backbone.packing import Segments
from tightbeam.common.backbone.trunk import PackedTrunk
from tightbeam.common.errors import UnsupportedModelError

__all__ = ["SelfTest", "self_test"]

_LENGTHS = (5, 9, 3)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative to the largest value


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What the self-test saw."""

    packed_error: float  # largest difference to the stock model run sequence by sequence, relative
    held_bytes_per_token: int  # what autograd keeps for a backward through the span


def self_test(trunk: PackedTrunk, span: range, dtype: torch.dtype) -> SelfTest:
    """Compare packed with plain on random rows, and check that no segment sees another's change.

    Raises `UnsupportedModelError` with the reason.
    """
    generator = torch.Generator().manual_seed(0)
    device = trunk.device()
    hidden_ND = torch.randn(sum(_LENGTHS), trunk.hidden_size, generator=generator).to(device, dtype)
    segments = Segments(_LENGTHS, torch.cat([torch.arange(n) for n in _LENGTHS]))
    name = type(trunk.model).__name__

    with torch.no_grad():
        packed_ND = _run_packed(trunk, hidden_ND, segments, span, name)
        plain_ND = _run_plain(trunk, hidden_ND, segments, span)
        error = float((packed_ND - plain_ND).abs().max() / plain_ND.abs().max())
        if not error <= _TOLERANCE[dtype]:
            raise UnsupportedModelError(
                f"{name} gives other results on packed rows (relative difference {error:.1e}).",
                cure="This architecture cannot be served; choose a tested family.",
            )
        start = _LENGTHS[0]
        changed_ND = hidden_ND.clone()
        changed_ND[:start] = float("nan")
        if not torch.equal(_run_packed(trunk, changed_ND, segments, span, name)[start:], packed_ND[start:]):
            raise UnsupportedModelError(
                f"{name} leaks across packed sequences: one sequence's values changed another's.",
                cure="This architecture cannot be served; choose a tested family.",
            )
    return SelfTest(error, _held_bytes_per_token(trunk, hidden_ND, segments, span))


def _run_packed(trunk: PackedTrunk, hidden_ND: Tensor, segments: Segments, span: range, name: str) -> Tensor:
    try:
        return trunk.run(hidden_ND, segments, span)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{name} does not run with a custom attention function: {type(error).__name__}: {error}",
            cure="This architecture cannot be served; choose a tested family.",
        ) from error


def _run_plain(trunk: PackedTrunk, hidden_ND: Tensor, segments: Segments, span: range) -> Tensor:
    config = trunk.config
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    trunk.set_attention("eager" if softcapped or not trunk.model._supports_sdpa else "sdpa")
    try:
        pieces = [
            trunk.run_plain(hidden_ND[None, a:b], segments.positions_N[None, a:b], span)[0]
            for a, b in segments.bounds
        ]
    finally:
        trunk.set_attention(PACKED_ATTENTION)
    return torch.cat(pieces)


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
