"""Attention over packed rows: no mask, nothing crosses a segment.

Registered with transformers' `AttentionInterface`, so that a stock decoder layer runs on `[1, N, D]`.
Borders come only from the `SegmentTable` the caller passes; positions serve rotary embeddings and nothing
else. A dense mask would let one sequence's NaN reach all others (0 * NaN), which separate calls cannot.

Tokens of several segments that follow the same tokens at the same positions have the same hidden state, so
they can share a row: everything but attention is then computed once for all of them, and queries, keys and
values are laid out per token only here.

H = query heads, K = key/value heads, N = packed tokens, M = rows (N unless some are shared), n = tokens of
one segment, E = head size (of values another than of queries in latent attention).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tightbeam.common.backbone.packing import Segments
from tightbeam.common.errors import UnsupportedModelError

__all__ = ["PACKED_ATTENTION", "SegmentTable", "SharedRows", "packed_attention"]

PACKED_ATTENTION = "tightbeam_packed"
# what models pass along that changes nothing here: positions are in the rows already, nothing is cached
_WITHOUT_EFFECT = {"cache_position", "output_attentions", "output_hidden_states", "position_ids", "use_cache"}


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Which row each token has, where tokens share rows; both on the device of the rows."""

    row_N: Tensor  # int64, each token's row
    token_M: Tensor  # int64, each row's first token


class SegmentTable:
    """Segment borders in the forms that kernels want, made once per step; counts the attention calls."""

    def __init__(self, segments: Segments, device: torch.device, shared: SharedRows | None = None) -> None:
        self.segments, self.device, self.shared = segments, device, shared
        self.lengths = segments.lengths
        self.bounds = segments.bounds
        self.num_calls = 0
        self.cumulative_S1: Tensor | None = None
        if device.type == "cuda":
            ends = [0, *(stop for _, stop in self.bounds)]
            self.cumulative_S1 = torch.tensor(ends, dtype=torch.int32, device=device)

    @property
    def row_positions(self) -> Tensor:
        """Each row's position, `[M]`."""
        return self.pick(self.segments.positions_N.to(self.device))

    def pick(self, tensor_N: Tensor) -> Tensor:
        """Of what every token has, `[N, ...]`, what every row has, `[M, ...]`."""
        return tensor_N if self.shared is None else tensor_N.index_select(0, self.shared.token_M)

    def spread(self, tensor_M: Tensor) -> Tensor:
        """What every token has, `[N, ...]`, of the rows."""
        return tensor_M if self.shared is None else tensor_M.index_select(0, self.shared.row_N)


def packed_attention(
    module: nn.Module,
    query_1HME: Tensor,
    key_1KME: Tensor,
    value_1KME: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: SegmentTable,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention of each segment alone; returns `[1, M, H, E]` and no weights.

    Honours `sliding_window` and `softcap`; refuses every argument that it does not know.
    """
    given = {name for name, value in others.items() if value is not None} - _WITHOUT_EFFECT
    if is_causal is False:
        given.add("is_causal=False")
    if given:
        raise UnsupportedModelError(
            f"Attention with {min(given)} is not supported on packed rows.",
            cure="This architecture cannot be served; choose a tested family.",
        )
    assert attention_mask is None
    assert dropout == 0.0, "the trunk runs in eval mode"
    segments.num_calls += 1
    window = sliding_window if sliding_window and max(segments.lengths) > sliding_window else None
    if segments.shared is None:
        return _attend(segments, query_1HME, key_1KME, value_1KME, scaling, window, softcap), None
    row_N, token_M = segments.shared.row_N, segments.shared.token_M
    query_1HNE, key_1KNE, value_1KNE = (x.index_select(2, row_N) for x in (query_1HME, key_1KME, value_1KME))
    out_1NHE = _attend(segments, query_1HNE, key_1KNE, value_1KNE, scaling, window, softcap)
    return out_1NHE.index_select(1, token_M), None


def _attend(
    segments: SegmentTable,
    query_1HNE: Tensor,
    key_1KNE: Tensor,
    value_1KNE: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`[1, N, H, E]` by the kernel that fits."""
    if softcap is not None:
        out = [
            _softcapped(q, k, v, scaling, window, softcap)
            for q, k, v in _pieces(segments, query_1HNE, key_1KNE, value_1KNE)
        ]
        return torch.cat(out, dim=2).transpose(1, 2)
    same_width = query_1HNE.shape[3] == value_1KNE.shape[3]
    if segments.cumulative_S1 is not None and query_1HNE.dtype != torch.float32 and same_width:
        return _varlen(segments, query_1HNE, key_1KNE, value_1KNE, scaling, window)
    if len(set(segments.lengths)) == 1:  # equal lengths: one batched call
        num = len(segments.lengths)
        q, k, v = (
            x.view(x.shape[1], num, -1, x.shape[3]).transpose(0, 1)
            for x in (query_1HNE, key_1KNE, value_1KNE)
        )
        return _sdpa(q, k, v, scaling, window).transpose(1, 2).flatten(0, 1)[None]
    out = [_sdpa(q, k, v, scaling, window) for q, k, v in _pieces(segments, query_1HNE, key_1KNE, value_1KNE)]
    return torch.cat(out, dim=2).transpose(1, 2)


def _pieces(segments: SegmentTable, *tensors_1XNE: Tensor) -> Iterable[tuple[Tensor, ...]]:
    # split, not slices: the backward of a slice fills a whole tensor with zeros
    return zip(*(x.split(segments.lengths, dim=2) for x in tensors_1XNE), strict=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if window is None or q.shape[2] <= window:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask_nn = _window_mask(q.shape[2], window, q.device)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask_nn, scale=scaling, enable_gqa=grouped)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    mask_nn = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask_nn if window is None else mask_nn.triu(1 - window)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float
) -> Tensor:
    """The eager formula of Gemma 2 (arXiv 2408.00118, section 2).

    Logits through `softcap * tanh(x / softcap)`.
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_window_mask(q.shape[2], window, q.device), torch.finfo(q.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _varlen(
    segments: SegmentTable,
    query_1HNE: Tensor,
    key_1KNE: Tensor,
    value_1KNE: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query_NHE, key_NKE, value_NKE = (x[0].transpose(0, 1) for x in (query_1HNE, key_1KNE, value_1KNE))
    longest, ends_S1 = max(segments.lengths), segments.cumulative_S1
    assert ends_S1 is not None
    repeats = query_NHE.shape[1] // key_NKE.shape[1]
    if repeats > 1:  # versions of varlen_attn before 2.12 know no grouped queries
        key_NKE, value_NKE = (x.repeat_interleave(repeats, dim=1) for x in (key_NKE, value_NKE))
    out_NHE = varlen_attn(
        query_NHE.contiguous(),
        key_NKE.contiguous(),
        value_NKE.contiguous(),
        ends_S1,
        ends_S1,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(out_NHE, Tensor)
    return out_NHE[None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
