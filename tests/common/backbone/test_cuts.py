"""Cuts and the policy that allows them; where families keep their parts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from support.tiny import TINY, tiny_model
from tightbeam.common.backbone import Cut, CutPolicy, dissect
from tightbeam.common.errors import CutError, UnsupportedModelError, UsageError


@given(bottom=st.integers(0, 50), top=st.integers(0, 50), num_blocks=st.integers(1, 80))
def test_a_cut_splits_the_blocks(bottom: int, top: int, num_blocks: int) -> None:
    cut = Cut.parse(f"{bottom}:{top}")
    assert str(cut) == f"{bottom}:{top}"
    if bottom + top >= num_blocks:
        with pytest.raises(CutError, match=f"leaves no trunk: the model has {num_blocks} blocks"):
            cut.trunk(num_blocks)
    else:
        assert list(cut.trunk(num_blocks)) == list(range(num_blocks))[bottom : num_blocks - top]


@pytest.mark.parametrize("text", ["", "4", "4:", ":4", "4:4:4", "-1:4", "a:b", "4;4", "99999:1", "4:4\n"])
def test_what_is_no_cut(text: str) -> None:
    with pytest.raises(CutError, match="is not a cut"):
        Cut.parse(text)


def test_a_policy_says_which_side_is_out_of_bounds() -> None:
    policy = CutPolicy.parse("min_bottom=2, max_top=3")
    assert policy == CutPolicy(2, 1, 16, 3)
    assert policy.check(Cut(2, 3), 10) == range(2, 7)
    with pytest.raises(CutError, match="2 to 16 bottom blocks, not 1"):
        policy.check(Cut(1, 1), 10)
    with pytest.raises(CutError, match="1 to 3 top blocks, not 4"):
        policy.check(Cut(2, 4), 10)
    assert policy.loaded(10) == range(2, 9)


@pytest.mark.parametrize("text", ["min_bottom", "min_bottom=x", "min_botom=1", "min_bottom=-1"])
def test_a_policy_that_is_not_understood(text: str) -> None:
    with pytest.raises(UsageError, match="Cut policy item"):
        CutPolicy.parse(text)


@pytest.mark.parametrize("family", TINY)
def test_the_parts_of_every_family(family: str) -> None:
    model = tiny_model(family)
    anatomy = dissect(model)
    assert len(anatomy.blocks) == 6
    assert model.get_submodule(anatomy.blocks_path) is anatomy.blocks
    assert isinstance(model.get_submodule(anatomy.embedding_path), nn.Embedding)
    assert isinstance(model.get_submodule(anatomy.head_path), nn.Linear)
    assert anatomy.trunk_owner is model.get_submodule(anatomy.blocks_path.rpartition(".")[0])


def test_two_lists_of_blocks_are_ambiguous() -> None:
    model = tiny_model("llama")
    model.add_module("more", nn.ModuleList(nn.Identity() for _ in range(6)))
    with pytest.raises(UnsupportedModelError, match="has 2 lists of 6 blocks"):
        dissect(model)
