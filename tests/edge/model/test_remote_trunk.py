"""The split model: what it holds, what it sends, and what it notes of every call.

Over in-process channels; exactness against the whole model is in tests/exactness.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from support.comparing import greedy
from support.in_process import InProcessCloud
from support.tiny import TINY, ragged_batch, tiny_model
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.backbone import Segments, dissect
from tightbeam.common.errors import UsageError
from tightbeam.edge.model.remote_trunk import PassThrough, RemoteTrunk, through_cloud

Clouds = Callable[[str], InProcessCloud]


def _split(
    cloud: InProcessCloud, run: str, rows: list[StepRow] | None = None, cut: str = "1:2"
) -> PreTrainedModel:
    stepper = cloud.stepper(run, cut, on_row=lambda row: None if rows is None else rows.append(row))
    return cloud.load_model(stepper, cut)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("cut", ["1:2", "2:1"])
def test_no_parameter_of_the_trunk_is_at_the_edge(tiny_cloud: Clouds, family: str, cut: str) -> None:
    """Counted in parameters and bytes: the whole model less the trunk's blocks, and nothing else."""
    whole, split = tiny_model(family), _split(tiny_cloud(family), f"memory {cut}", cut=cut)
    bottom, top = (int(part) for part in cut.split(":"))
    blocks = dissect(whole).blocks
    trunk_bytes = sum(
        p.numel() * p.element_size() for block in blocks[bottom : 6 - top] for p in block.parameters()
    )
    assert trunk_bytes > 0
    held, full = ({id(p): p.numel() * p.element_size() for p in m.parameters()} for m in (split, whole))
    assert sum(held.values()) == sum(full.values()) - trunk_bytes
    assert not any(p.is_meta for p in split.parameters())
    kept = dissect(whole).blocks_path
    indices = {
        int(n[len(kept) + 1 :].split(".")[0]) for n, _ in split.named_parameters() if n.startswith(kept)
    }
    assert indices == {*range(bottom), *range(6 - top, 6)}


@pytest.mark.parametrize("family", TINY)
def test_what_stays_keeps_name_and_value(tiny_cloud: Clouds, family: str) -> None:
    whole = dict(tiny_model(family).named_parameters())
    for name, parameter in _split(tiny_cloud(family), "names").named_parameters():
        assert torch.equal(parameter, whole[name]), name
        assert not parameter.requires_grad


def test_the_trunk_stands_in_its_blocks_places(tiny_cloud: Clouds) -> None:
    blocks = dissect(_split(tiny_cloud("llama"), "places")).blocks
    kinds = [type(block) for block in blocks]
    assert kinds[1:4] == [RemoteTrunk, PassThrough, PassThrough]
    assert kinds[0] == kinds[4] == kinds[5]
    assert not any(True for block in blocks[1:4] for _ in block.parameters())


def test_padding_never_crosses(tiny_cloud: Clouds) -> None:
    rows: list[StepRow] = []
    model, batch = _split(tiny_cloud("llama"), "padding", rows), ragged_batch(5, 12, side="left")
    with torch.no_grad():
        model(**batch)
    num_tokens = int(batch["attention_mask"].sum())
    assert num_tokens < batch["attention_mask"].numel()
    assert (rows[0].tokens, rows[0].segments) == (num_tokens, 5)
    assert rows[0].bytes.payload_up_bytes == num_tokens * 32 * 4


def test_values_at_padding_change_nothing_at_tokens(tiny_cloud: Clouds) -> None:
    model, batch = _split(tiny_cloud("llama"), "noise"), ragged_batch(4, 10, side="right")
    noisy = batch["input_ids"].where(batch["attention_mask"] == 1, 77)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        plain = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        other = model(noisy, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(plain[real], other[real])


def test_only_what_needs_a_backward_is_kept(tiny_cloud: Clouds) -> None:
    cloud = tiny_cloud("llama")
    model: Any = _split(cloud, "keep")
    batch = ragged_batch(2, 8, side="right")
    cloud.forget_steps()
    model(**batch)  # nothing is trained at or below the cut
    with torch.no_grad():
        model(**batch)
    assert len(cloud.retention) == 0
    model.get_input_embeddings().weight.requires_grad_(True)
    loss = model(**batch).loss
    assert len(cloud.retention) == 1
    loss.backward()
    assert len(cloud.retention) == 0


def test_only_the_top_is_trained_without_a_backward(tiny_cloud: Clouds) -> None:
    rows: list[StepRow] = []
    model: Any = _split(tiny_cloud("llama"), "top only", rows)
    model.model.layers[5].requires_grad_(True)
    model(**ragged_batch(2, 8, side="right")).loss.backward()
    assert [row.kind for row in rows] == ["forward"]
    assert model.model.layers[5].mlp.up_proj.weight.grad is not None


def test_a_mask_is_found_wherever_it_stands(tiny_cloud: Clouds) -> None:
    """By name or by position; and it is forgotten with its call."""
    rows: list[StepRow] = []
    model: Any = _split(tiny_cloud("llama"), "mask", rows)
    batch = ragged_batch(3, 9, side="right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        model.model(input_ids=ids, attention_mask=mask)
        model.model(ids, mask)
        model.model(ids)
    assert [row.tokens for row in rows] == [int(mask.sum()), int(mask.sum()), ids.numel()]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_a_mask_of_any_kind(tiny_cloud: Clouds, dtype: torch.dtype) -> None:
    rows: list[StepRow] = []
    model, batch = _split(tiny_cloud("llama"), f"mask {dtype}", rows), ragged_batch(3, 9, side="right")
    with torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"].to(dtype))
    assert rows[0].tokens == int(batch["attention_mask"].sum())


def test_a_backward_through_a_backward_is_refused(tiny_cloud: Clouds) -> None:
    hidden_ND = torch.ones(4, 32, requires_grad=True)
    out_ND = through_cloud(hidden_ND, tiny_cloud("llama").stepper("twice"), Segments((4,), torch.arange(4)))
    (grad_ND,) = torch.autograd.grad(out_ND.square().sum(), hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_ND.sum().backward()


def test_a_cut_without_a_cache_still_generates(tiny_cloud: Clouds) -> None:
    model = _split(tiny_cloud("gpt2"), "generate")
    prompts = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    assert greedy(model, prompts, 4).shape == (1, 5)
    with pytest.raises(UsageError, match="use_cache=False"):
        greedy(model, prompts, 4, use_cache=True)
