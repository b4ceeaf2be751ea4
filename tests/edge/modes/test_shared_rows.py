"""Tokens that begin several samples alike are computed once, and nothing else changes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.comparing import gradients
from support.tiny import TINY, ragged_batch, tiny_model
from tightbeam.common.backbone import SegmentTable, packed_attention
from tightbeam.edge.model.packed_rows import PackedRows
from tightbeam.edge.modes.last_block import last_mlp
from tightbeam.edge.modes.packed import PackedBatch, packed_attention_in, packed_loss

PREFIX = 3


def batch(side: str = "right") -> dict[str, Tensor]:
    """Four samples that begin with the same three tokens, one of them with nothing else."""
    given = ragged_batch(4, 14, side=side)
    keep_BT, beginning = given["attention_mask"].bool(), torch.tensor([11, 12, 13])
    for row, keep_T in enumerate(keep_BT):
        start = int(keep_T.int().argmax())
        given["input_ids"][row, start : start + PREFIX] = beginning
        keep_T[start] = False  # nothing predicts the first token
    given["labels"] = given["input_ids"].masked_fill(~keep_BT, -100)
    return given


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", list(TINY))
def test_loss_and_gradients_are_those_of_the_padded_batch(family: str, side: str) -> None:
    """Also where the last MLP runs for learned tokens only."""
    model, given = tiny_model(family), batch(side)
    given["labels"][0, 4:8] = -100
    positions = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    plain = model(**given, position_ids=positions).loss
    plain.backward()
    expected = gradients(model)
    packed = PackedBatch.of(given)
    assert packed.rows.num_rows == len(packed.rows.input_ids_N) - 3 * PREFIX
    mlp, computed = last_mlp(model), []
    assert (mlp is None) == (family == "opt")
    if mlp is not None:
        mlp.register_forward_hook(lambda m, args, out: computed.append(args[0].shape[1]))
    with packed_attention_in(model):
        loss = packed_loss(model, packed, mlp)
        loss.backward()
    assert computed == ([] if mlp is None else [packed.num_read])
    assert packed.num_read < min(packed.rows.num_rows, len(packed.place_L))
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=2e-5, rtol=1e-4), name


def test_blocks_compute_each_row_once() -> None:
    model, packed = tiny_model("llama"), PackedBatch.of(batch())
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    with packed_attention_in(model), torch.no_grad():
        shared = packed_loss(model, packed)
        alone = packed_loss(model, replace(packed, rows=replace(packed.rows, shared=None)))
    assert seen == [packed.rows.num_rows, len(packed.rows.input_ids_N)]
    assert shared.item() == pytest.approx(alone.item(), abs=1e-6)


def test_only_what_begins_alike_is_shared() -> None:
    def rows(*samples: tuple[int, ...]) -> tuple[int, int]:
        packed = PackedRows.of_samples(samples, torch.device("cpu"))
        return packed.num_rows, len(packed.input_ids_N)

    assert rows((1, 2, 3), (1, 2, 4)) == (4, 6)
    assert rows((1, 2, 3), (4, 2, 3)) == (6, 6)  # alike, but after another token
    assert rows((1, 2, 3), (1, 2, 3)) == (3, 6)
    assert rows((1, 2), (1, 2, 3), (1, 2, 3, 4)) == (4, 9)


def test_a_wrong_row_would_be_noticed() -> None:
    """The equality above can tell: one token that takes another's row changes the loss."""
    model, packed = tiny_model("llama"), PackedBatch.of(batch())
    assert packed.rows.shared is not None
    wrong_N = packed.rows.shared.row_N.clone()
    wrong_N[packed.rows.segments.bounds[1][1] - 2] = 0
    wrong = replace(packed.rows, shared=replace(packed.rows.shared, row_N=wrong_N))
    with packed_attention_in(model), torch.no_grad():
        losses = [float(packed_loss(model, p)) for p in (packed, replace(packed, rows=wrong))]
    assert losses[0] != pytest.approx(losses[1], abs=1e-5)


def test_attention_over_shared_rows_is_that_over_all() -> None:
    """To the last bit: only the layout of what it reads differs."""
    packed = PackedRows.of_samples([(1, 2, 3), (1, 2, 4, 5), (1, 2)], torch.device("cpu"))
    table = SegmentTable(packed.segments, torch.device("cpu"), packed.shared)
    plain = SegmentTable(packed.segments, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, packed.num_rows, 4, generator=generator) for heads in (4, 2, 2))
    module = torch.nn.Module()
    one, _ = packed_attention(module, q, k, v, None, segments=table)
    q, k, v = (table.spread(x[0].transpose(0, 1)).transpose(0, 1)[None] for x in (q, k, v))
    two, _ = packed_attention(module, q, k, v, None, segments=plain)
    assert torch.equal(one[0], table.pick(two[0]))
