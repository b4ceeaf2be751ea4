"""The self-test passes every tested family and fires on each way to be wrong: a leak, other results."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.tiny import TINY, tiny_model
from tightbeam.common.backbone import PackedTrunk, Segments, SegmentTable, attention, self_test
from tightbeam.common.backbone.attention import packed_attention
from tightbeam.common.errors import UnsupportedModelError

_SPAN = range(1, 5)


class _Altered(nn.Module):
    """A block of an architecture that does something else to the packed rows."""

    def __init__(self, block: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self._change = block, change

    def forward(self, hidden_1ND: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._change(self.block(hidden_1ND, *args, **kwargs))


def _trunk(change: Callable[[Tensor], Tensor]) -> PackedTrunk:
    model = tiny_model("llama")
    blocks: Any = model.get_submodule("model.layers")
    blocks[2] = _Altered(blocks[2], change)
    return PackedTrunk(model)


@pytest.mark.parametrize("family", TINY)
def test_every_family_passes(family: str) -> None:
    seen = self_test(PackedTrunk(tiny_model(family)), _SPAN, torch.float32)
    assert seen.packed_error < 1e-5
    assert seen.held_bytes_per_token > 32 * 4 * len(_SPAN)


def test_a_change_of_nothing_passes() -> None:
    """The control of the controls below."""
    self_test(_trunk(lambda hidden_1ND: hidden_1ND + 0.0), _SPAN, torch.float32)


def test_other_results_are_refused() -> None:
    """A block that looks at its neighbour's row, as a convolution does, differs at every border."""
    trunk = _trunk(lambda hidden_1ND: hidden_1ND + 0.1 * hidden_1ND.roll(1, dims=1))
    with pytest.raises(UnsupportedModelError, match="gives other results on packed rows"):
        self_test(trunk, _SPAN, torch.float32)


def test_a_leak_too_small_to_see_is_refused() -> None:
    """Far within the tolerance, but one sequence's NaN would reach all others."""
    trunk = _trunk(lambda hidden_1ND: hidden_1ND + 1e-9 * hidden_1ND.mean(dim=1, keepdim=True))
    with pytest.raises(UnsupportedModelError, match="leaks across packed sequences"):
        self_test(trunk, _SPAN, torch.float32)


def test_results_that_are_no_numbers_are_refused() -> None:
    trunk = _trunk(lambda hidden_1ND: hidden_1ND * float("nan"))
    with pytest.raises(UnsupportedModelError, match="gives other results"):
        self_test(trunk, _SPAN, torch.float32)


class _OwnAttention(nn.Module):
    """Attention written out in the block, over all rows: transformers' interface is never asked."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        scores_1NN = hidden_states @ hidden_states.transpose(1, 2)
        future_NN = torch.ones_like(scores_1NN[0], dtype=torch.bool).triu(1)
        return scores_1NN.masked_fill(future_NN, -1e9).softmax(-1) @ hidden_states, None


def test_an_attention_of_its_own_is_refused() -> None:
    model = tiny_model("llama")
    block: Any = model.get_submodule("model.layers.3")
    block.self_attn = _OwnAttention()
    with pytest.raises(UnsupportedModelError, match="leaks across packed sequences"):
        self_test(PackedTrunk(model), _SPAN, torch.float32)


class _Strict(nn.Module):
    """A block that takes no arguments but its own."""

    def forward(self, hidden_1ND: Tensor) -> Tensor:
        return hidden_1ND


def test_a_block_that_does_not_take_the_segments_is_refused() -> None:
    model = tiny_model("llama")
    blocks: Any = model.get_submodule("model.layers")
    blocks[2] = _Strict()
    with pytest.raises(
        UnsupportedModelError, match="does not run with a custom attention function: TypeError"
    ):
        self_test(PackedTrunk(model), _SPAN, torch.float32)


def test_a_window_longer_than_the_other_sequences_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = PackedTrunk(tiny_model("mistral", sliding_window=40))
    self_test(trunk, _SPAN, torch.float32)
    monkeypatch.setattr(attention, "_window_mask", lambda n, window, device: torch.ones(n, n).tril().bool())
    with pytest.raises(UnsupportedModelError, match="gives other results on packed rows"):
        self_test(trunk, _SPAN, torch.float32)


@pytest.mark.parametrize("name", ["s_aux", "sinks", "position_bias", "attention_chunk_size", "block_mask"])
def test_attention_that_is_not_known_is_refused(name: str) -> None:
    table = SegmentTable(Segments((3,), torch.arange(3)), torch.device("cpu"))
    heads = torch.ones(1, 2, 3, 4)
    packed_attention(nn.Identity(), heads, heads, heads, None, segments=table, use_cache=False)
    extra: dict[str, Any] = {name: torch.ones(2)}
    with pytest.raises(UnsupportedModelError, match=name):
        packed_attention(nn.Identity(), heads, heads, heads, None, segments=table, **extra)
