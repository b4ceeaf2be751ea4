"""Packed rows give the model's own loss and gradients in every family, and a cache answers any forward."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from support.comparing import gradients
from support.edge_runs import byte_tokenizer
from support.in_process import InProcessCloud
from support.tiny import TINY, ragged_batch, tiny_model
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.errors import UsageError
from tightbeam.edge.cache import ActivationCache
from tightbeam.edge.cache.filler import Filler, Sample
from tightbeam.edge.cache.shortcut import FrozenParts, TrunkShortcut
from tightbeam.edge.modes.packed import PackedBatch, packed_attention_in, packed_loss

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", list(TINY))
def test_the_packed_loss_is_the_models_own(family: str, side: str) -> None:
    model, batch = tiny_model(family), ragged_batch(4, 14, side=side)
    batch["labels"][:, :4] = -100
    positions = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    plain = model(**batch, **positions).loss
    plain.backward()
    expected = gradients(model)
    with packed_attention_in(model):
        loss = packed_loss(model, PackedBatch.of(batch))
        loss.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=2e-5, rtol=1e-4), name
    assert model(**batch, **positions).loss.item() == plain.item()  # padded batches work again


def test_a_wrong_mask_would_be_noticed() -> None:
    model, batch = tiny_model("llama"), ragged_batch(4, 14, side="right")
    other = dict(batch, labels=batch["labels"].clone())
    other["labels"][0, 3] = -100
    with packed_attention_in(model), torch.no_grad():
        one, two = (float(packed_loss(model, PackedBatch.of(b))) for b in (batch, other))
    assert one != pytest.approx(two, abs=1e-5)


def test_only_learned_tokens_reach_the_head() -> None:
    model, batch = tiny_model("llama"), ragged_batch(3, 10, side="right")
    batch["labels"][:, :6] = -100
    shapes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1]))
    with packed_attention_in(model), torch.no_grad():
        packed_loss(model, PackedBatch.of(batch))
    assert shapes == [int((batch["labels"][:, 1:] != -100).sum())]


class Edge:
    """A split model with LoRA on its top blocks, a cache behind its trunk, and what crossed."""

    def __init__(self, cloud: InProcessCloud, folder: Path) -> None:
        self.rows: list[StepRow] = []
        stepper = cloud.stepper(f"run-{folder.parent.name}", "2:2", on_row=self.rows.append)
        base = cloud.load_model(stepper, "2:2")
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[4, 5])
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        assert isinstance(model, PeftModel)
        self.model = model
        self.parts = FrozenParts.of(base)
        scope = self.parts.scope(cloud.backbone.fingerprint, "2:2", "", base.dtype, 16)
        self.cache = ActivationCache(folder, scope, secret=b"s", max_bytes=10**8, warn=pytest.fail)
        self.shortcut = TrunkShortcut(self.parts, self.cache, base.dtype, 16)

    def close(self) -> None:
        self.shortcut.remove()
        self.cache.close()


@pytest.fixture
def edge(cloud: InProcessCloud, tmp_path: Path) -> Iterator[Edge]:
    made = Edge(cloud, tmp_path / "cache")
    yield made
    made.close()


def test_a_cached_forward_is_the_fetched_one_and_runs_no_bottom(edge: Edge) -> None:
    calls: list[int] = []
    edge.parts.blocks[0].register_forward_hook(lambda *args: calls.append(0))
    batch = ragged_batch(4, 12, side="right")
    fetched = edge.model(**batch).loss
    fetched.backward()
    first = gradients(edge.model)
    assert (len(calls), len(edge.rows), len(edge.cache)) == (1, 1, 4)
    cached = edge.model(**batch).loss
    cached.backward()
    second = gradients(edge.model)
    assert (len(calls), len(edge.rows)) == (1, 1)
    assert cached.item() == fetched.item()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_is_missing_crosses(edge: Edge) -> None:
    batch = ragged_batch(4, 12, side="right")
    edge.model(**{name: rows[:2] for name, rows in batch.items()})
    with_both = edge.model(**batch).loss
    assert [row.segments for row in edge.rows] == [2, 2]
    edge.shortcut.remove()
    assert edge.model(**batch).loss.item() == pytest.approx(with_both.item(), abs=1e-6)


def test_evaluation_and_generation_only_read(edge: Edge) -> None:
    batch = ragged_batch(2, 12, side="right")
    edge.model.eval()
    with torch.no_grad():
        edge.model(**batch)
        prompt = torch.tensor([byte_tokenizer()("what is it")["input_ids"]])
        edge.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )
    assert len(edge.cache) == 0
    assert len(edge.rows) == 4


def test_a_trained_bottom_is_refused(edge: Edge) -> None:
    next(iter(edge.parts.blocks[0].parameters())).requires_grad_(True)
    with pytest.raises(UsageError, match="below the cut is trained"):
        edge.model(**ragged_batch(2, 12, side="right"))


def test_frozen_parts_are_in_evaluation_mode(edge: Edge) -> None:
    edge.model.train()
    edge.model(**ragged_batch(2, 12, side="right"))
    assert not edge.parts.blocks[0].training
    assert edge.parts.blocks[5].training


def test_left_padding_goes_through_the_cloud(edge: Edge) -> None:
    """Families count positions differently there, so such a batch is not what the cache holds."""
    batch = ragged_batch(3, 12, side="left")
    batch["attention_mask"][0, 0], batch["labels"][0, 1] = 0, -100
    for _ in range(2):
        edge.model(**batch)
    assert len(edge.rows) == 2
    assert len(edge.cache) == 0


def test_the_filler_keeps_several_in_flight_and_repeats_nothing(edge: Edge) -> None:
    samples = [Sample(tuple(range(3, 8 + n))) for n in range(6)]
    groups = [samples[:2], samples[1:3], samples[3:5], samples[5:], samples[:1]]
    edge.parts.trunk.stepper.max_tokens_per_step = 17  # no two of them fit
    with packed_attention_in(edge.model.get_base_model()):
        filler = Filler(edge.shortcut, groups, in_flight=3)
        filler.ensure([samples[0].digest])
        assert samples[0].digest in edge.cache
        done_at_once = filler.done
        filler.finish()
    assert not done_at_once
    assert filler.done
    assert [row.segments for row in edge.rows] == [2, 1, 2, 1]
    assert len(edge.cache) == 6
    with packed_attention_in(edge.model.get_base_model()):
        again = Filler(edge.shortcut, groups)
        again.finish()
    assert len(edge.rows) == 4  # all held: nothing crosses


def test_batches_that_follow_each_other_cross_together(edge: Edge) -> None:
    """As many as fit; what is held is left out first, so the rest does not depend on how far a fill came."""
    samples = [Sample((1, 2, *range(3, 6 + n))) for n in range(6)]  # of 5 to 10 tokens, 5 of them in common
    batches = [samples[:2], samples[2:3], samples[3:5], samples[5:]]
    edge.parts.trunk.stepper.max_tokens_per_step = 27
    with packed_attention_in(edge.model.get_base_model()):
        filler = Filler(edge.shortcut, batches)
        assert (filler.ahead.num_rows, filler.ahead.num_samples, filler.ahead.num_steps) == (7 + 10, 6, 2)
        filler.finish()
    assert [(row.segments, row.tokens, row.shared_tokens) for row in edge.rows] == [(3, 18, 11), (3, 27, 17)]
    edge.parts.trunk.stepper.max_tokens_per_step = 4096
    with packed_attention_in(edge.model.get_base_model()):
        Filler(edge.shortcut, [*batches, [Sample((9,))]]).finish()
    assert [row.segments for row in edge.rows] == [3, 3, 1]


def test_a_lost_connection_in_mid_flight_is_made_good(cloud: InProcessCloud, tmp_path: Path) -> None:
    edge = Edge(cloud, tmp_path / "cache")
    samples = [Sample(tuple(range(3, 8 + n))) for n in range(6)]
    edge.parts.trunk.stepper.max_tokens_per_step = 10  # no two fit
    with packed_attention_in(edge.model.get_base_model()):
        filler = Filler(edge.shortcut, [[sample] for sample in samples], in_flight=3)
        filler.pump()
        channel = edge.parts.trunk.stepper._carrier._channel
        assert channel is not None
        channel.close()
        filler.finish()
    assert len(edge.cache) == 6
    assert sorted(row.step for row in edge.rows) == list(range(6))  # each billed under its own key, once
    assert max(row.attempts for row in edge.rows) == 2
    edge.close()
