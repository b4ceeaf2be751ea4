"""One contract for every trunk: the blocks in this process, and the same blocks behind a channel."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support.in_process import InProcessCloud
from support.tiny import TINY, tiny_model
from tightbeam.common.backbone import PackedTrunk, Segments, Trunk
from tightbeam.edge.model.remote_trunk import through_cloud

_SPAN = range(1, 4)


class TrunkContract:
    """What every `Trunk` keeps; a subclass gives the fixture `trunk` for blocks 1 to 3 of the tiny Llama."""

    def _segments(self, *lengths: int) -> Segments:
        return Segments(lengths, torch.cat([torch.arange(n) for n in lengths]))

    def _hidden(self, num_tokens: int, seed: int = 0) -> Tensor:
        return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))

    def test_it_equals_the_stock_blocks(self, trunk: Trunk) -> None:
        reference = PackedTrunk(tiny_model("llama"))
        reference.set_attention("sdpa")
        segments, hidden_ND = self._segments(5, 2), self._hidden(7)
        plain_ND = torch.cat(
            [
                reference.run_plain(hidden_ND[None, a:b], torch.arange(b - a)[None], _SPAN)[0]
                for a, b in ((0, 5), (5, 7))
            ]
        )
        # other shapes of the same matrix products: the last bits differ
        torch.testing.assert_close(trunk(hidden_ND, segments), plain_ND, rtol=1e-5, atol=1e-5)

    def test_gradients_reach_the_input(self, trunk: Trunk) -> None:
        segments, hidden_ND = self._segments(3, 4), self._hidden(7).requires_grad_()
        trunk(hidden_ND, segments).square().sum().backward()
        expected_ND = self._hidden(7).requires_grad_()
        PackedTrunk(tiny_model("llama")).run(expected_ND, segments, _SPAN).square().sum().backward()
        assert hidden_ND.grad is not None
        assert expected_ND.grad is not None
        assert torch.equal(hidden_ND.grad, expected_ND.grad)

    def test_without_gradients_nothing_is_attached(self, trunk: Trunk) -> None:
        with torch.no_grad():
            assert not trunk(self._hidden(4), self._segments(4)).requires_grad
        assert not trunk(self._hidden(4), self._segments(4)).requires_grad

    def test_no_segment_sees_another(self, trunk: Trunk) -> None:
        together_ND = trunk(self._hidden(9), self._segments(4, 5))
        changed_ND = self._hidden(9)
        changed_ND[:4] = 1e6
        assert torch.equal(trunk(changed_ND, self._segments(4, 5))[4:], together_ND[4:])

    def test_segments_matter(self, trunk: Trunk) -> None:
        hidden_ND = self._hidden(6)
        assert not torch.equal(trunk(hidden_ND, self._segments(6)), trunk(hidden_ND, self._segments(3, 3)))

    def test_the_input_stays_as_it_is(self, trunk: Trunk) -> None:
        hidden_ND = self._hidden(5)
        trunk(hidden_ND, self._segments(5))
        assert torch.equal(hidden_ND, self._hidden(5))

    def test_positions_are_honoured(self, trunk: Trunk) -> None:
        """Rotary embeddings see distances, so only a gap between positions changes a result."""
        hidden_ND = self._hidden(4)
        gap = Segments((4,), torch.tensor([0, 1, 7, 8]))
        assert not torch.allclose(trunk(hidden_ND, gap), trunk(hidden_ND, self._segments(4)), atol=1e-3)


class TestPackedTrunk(TrunkContract):
    @pytest.fixture
    def trunk(self) -> Trunk:
        return PackedTrunk(tiny_model("llama")).span(_SPAN)


class TestRemoteTrunk(TrunkContract):
    @pytest.fixture
    def trunk(self, tiny_cloud: Callable[[str], InProcessCloud], request: pytest.FixtureRequest) -> Trunk:
        stepper = tiny_cloud("llama").stepper(f"trunk {request.node.name}", "1:2")
        return lambda hidden_ND, segments: through_cloud(hidden_ND, stepper, segments)


@pytest.mark.parametrize("family", TINY)
def test_spans_compose(family: str) -> None:
    """Running blocks one by one is running them together: the slots hand over exactly the boundary."""
    trunk = PackedTrunk(tiny_model(family))
    segments = Segments((6, 7), torch.cat([torch.arange(6), torch.arange(7)]))
    hidden_ND = torch.randn(13, 32, generator=torch.Generator().manual_seed(0))
    together_ND = trunk.run(hidden_ND, segments, range(6))
    for index in range(6):
        hidden_ND = trunk.run(hidden_ND, segments, range(index, index + 1))
    assert torch.equal(hidden_ND, together_ND)


@pytest.mark.parametrize("family", TINY)
def test_equal_lengths_take_the_batched_way_to_the_same_result(family: str) -> None:
    trunk = PackedTrunk(tiny_model(family))
    hidden_ND = torch.randn(18, 32, generator=torch.Generator().manual_seed(0))
    segments = Segments((6, 6, 6), torch.arange(6).repeat(3))
    batched_ND = trunk.run(hidden_ND, segments, _SPAN)
    single_ND = torch.cat(
        [trunk.run(hidden_ND[a:b], Segments((6,), torch.arange(6)), _SPAN) for a, b in segments.bounds]
    )
    # one call over three heads' worth of rows sums in another order than three calls
    torch.testing.assert_close(batched_ND, single_ND, rtol=1e-5, atol=1e-5)
