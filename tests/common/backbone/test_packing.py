"""Packing: what is packed comes back, borders are where sequences end, and positions survive the wire."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightbeam.common.backbone import Packer, Segments
from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.stepping import content_sha256, header_segments
from tightbeam.proto.backbone_pb2 import FORWARD, StepRequest


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Any mask with at least one token, holes and empty rows included."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    bits = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length).filter(any))
    return torch.tensor(bits).reshape(batch, length)


@settings(deadline=None)
@given(mask_BT=masks())
def test_packing_keeps_tokens_in_order_and_drops_the_rest(mask_BT: Tensor) -> None:
    shape_BT = (mask_BT.shape[0], mask_BT.shape[1])
    hidden_BTD = torch.randn(*shape_BT, 3, generator=torch.Generator().manual_seed(0))
    packer = Packer(shape_BT, mask_BT.long(), torch.arange(shape_BT[1])[None])
    packed_ND = packer.pack(hidden_BTD)
    assert torch.equal(packed_ND, hidden_BTD[mask_BT])
    assert packer.segments.num_tokens == int(mask_BT.sum())
    assert packer.segments.lengths == tuple(n for n in mask_BT.sum(1).tolist() if n)
    back_BTD = packer.unpack(packed_ND)
    assert torch.equal(back_BTD, hidden_BTD * mask_BT[..., None])


@settings(deadline=None)
@given(mask_BT=masks())
def test_gradients_pass_both_ways(mask_BT: Tensor) -> None:
    shape_BT = (mask_BT.shape[0], mask_BT.shape[1])
    hidden_BTD = torch.ones(*shape_BT, 2, requires_grad=True)
    packer = Packer(shape_BT, mask_BT, torch.arange(shape_BT[1])[None])
    (packer.unpack(3 * packer.pack(hidden_BTD))).sum().backward()
    assert hidden_BTD.grad is not None
    assert torch.equal(hidden_BTD.grad, 3.0 * mask_BT[..., None].expand_as(hidden_BTD))


def test_restarting_positions_are_borders_only_without_a_mask() -> None:
    positions_BT = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    assert Packer((2, 5), None, positions_BT).segments.lengths == (3, 2, 5)
    assert Packer((2, 5), torch.ones(2, 5), positions_BT).segments.lengths == (5, 5)


def test_positions_are_those_of_the_tokens() -> None:
    mask_BT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    shifted = Packer((2, 4), mask_BT, torch.arange(4)[None]).segments
    assert shifted.positions_N.tolist() == [2, 3, 0, 1, 2]
    assert shifted.bounds == [(0, 2), (2, 5)]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), data=st.data())
def test_positions_survive_as_runs(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    positions = data.draw(st.lists(st.integers(0, 9), min_size=total, max_size=total))
    segments = Segments(tuple(lengths), torch.tensor(positions))
    starts, counts = segments.runs()
    header = StepRequest(lengths=lengths, run_starts=starts, run_lengths=counts)
    again = header_segments(header)
    assert again.lengths == segments.lengths
    assert again.positions_N.tolist() == positions


@pytest.mark.parametrize(
    ("lengths", "starts", "counts"),
    [
        ([], [], []),
        ([2], [], []),
        ([2], [0], [1]),
        ([2], [0, 0], [2]),
        ([2, 0], [0], [2]),
        ([4, 3], [0], [8]),
    ],
)
def test_segments_that_contradict_themselves(
    lengths: list[int], starts: list[int], counts: list[int]
) -> None:
    with pytest.raises(ProtocolError):
        header_segments(StepRequest(lengths=lengths, run_starts=starts, run_lengths=counts))


def test_the_content_of_a_step_is_everything_that_decides_its_answer() -> None:
    header = StepRequest(
        step=3, kind=FORWARD, reply_codec="fp32", lengths=[2, 3], run_starts=[0, 0], run_lengths=[2, 3]
    )
    tensors = [b"gradient", b"inputs"]
    changes = [
        ("3:1", header, tensors),
        ("1:1", header, [b"other", b"inputs"]),
        ("1:1", header, [b"gradient", b"other"]),
        *(
            ("1:1", _changed(header, **{name: value}), tensors)
            for name, value in (
                ("lengths", [3, 2]),
                ("run_starts", [0, 1]),
                ("run_lengths", [3, 2]),
                ("reply_codec", "bf16"),
                ("kind", 2),
            )
        ),
    ]
    digests = {content_sha256(header, "1:1", tensors)}
    digests |= {content_sha256(changed, cut, data) for cut, changed, data in changes}
    assert len(digests) == 1 + len(changes)
    # the same step, sent again, may keep something else and has another number of tensors
    assert content_sha256(_changed(header, keep=True), "1:1", tensors) in digests


def _changed(header: StepRequest, **values: Any) -> StepRequest:
    kept = {field.name: value for field, value in header.ListFields() if field.name not in values}
    return StepRequest(**kept, **values)
