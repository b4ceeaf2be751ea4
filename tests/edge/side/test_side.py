"""Mode `side`: what crosses stays frozen and crosses once, every gradient stays here, and it learns more."""

import json
import uuid
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Trainer, TrainingArguments

from support.cached_runs import cached_recipe, save_model, train_over
from support.comparing import targets
from support.edge_runs import byte_tokenizer, tiny_llama
from support.in_process import InProcessCloud
from support.tiny import ragged_batch, tiny_model
from tightbeam.cloud.projections import ProjectionOptions
from tightbeam.common.backbone import Segments, SegmentTable
from tightbeam.common.errors import BudgetError, CutError, FingerprintError, UsageError
from tightbeam.edge.data import collate, load_examples
from tightbeam.edge.link.carrier import Flight
from tightbeam.edge.link.stepper import Stepper
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.side import add_side, choose_taps, load_side, save_side, side_of, side_parameters
from tightbeam.edge.training.folder import RunFolder

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SIDE = {"taps": 2, "width": 16, "heads": 2}
LAYERS = {"taps": 2, "width": 16, "heads": 2}
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


def plain(cloud: InProcessCloud, cut: str = "2:2") -> tuple[PreTrainedModel, Stepper]:
    stepper = cloud.stepper(f"run-{uuid.uuid4().hex}", cut)
    return cloud.load_model(stepper, cut), stepper


def adapted(model: PreTrainedModel, **changes: Any) -> peft.PeftModel:
    torch.manual_seed(3)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1}
    layers = {"layers_to_transform": [0, 1, 4, 5]}
    return peft.get_peft_model(model, peft.LoraConfig(**(config | layers | changes)))


def side_model(cloud: InProcessCloud, cut: str = "2:2", taps: int = 2, **changes: Any) -> peft.PeftModel:
    model = adapted(plain(cloud, cut)[0], **changes)
    add_side(model, cloud.card, **{**LAYERS, "taps": taps})
    return model


def disturb(model: torch.nn.Module) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def batch(side: str = "right") -> dict[str, Tensor]:
    return ragged_batch(3, 10, side=side, vocab=261)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("taps", [0, 2])
def test_step_0_is_the_backbone_to_the_last_bit(cloud: InProcessCloud, taps: int, padding: str) -> None:
    given = batch(padding)
    reference = plain(cloud)[0](**given).logits
    model = side_model(cloud, taps=taps)
    for training in (False, True):  # dropout of an adapter that is zero is zero
        model.train(training)
        assert torch.equal(model(**given).logits, reference)
    disturb(model)
    assert not torch.allclose(model(**given).logits, reference, atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "qwen3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Learned positions, fused matrices, sliding windows: step 0 is the backbone, and it trains."""
    whole = tiny_model(family, vocab_size=261)
    whole.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "public.txt").write_text(TEXT, encoding="utf-8")
    fit = ProjectionOptions(file=tmp_path / "p.safetensors", text=tmp_path / "public.txt", size=4)
    with InProcessCloud(tmp_path / "model", tmp_path / "cloud", projection=fit) as cloud:
        model = adapted(plain(cloud)[0], target_modules=targets(family), fan_in_fan_out=family == "gpt2")
        add_side(model, cloud.card, **LAYERS)
        given = batch()
        keep = given["attention_mask"].bool()
        before = model.train()(**given)
        assert torch.allclose(before.logits[keep], whole(**given).logits[keep], rtol=1e-4, atol=1e-4)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(6):
            optimizer.zero_grad()
            model(**given).loss.backward()
            optimizer.step()
        assert model(**given).loss.item() < before.loss.item() - 0.1


def test_the_formula_on_the_whole_model(cloud: InProcessCloud, folder: Path) -> None:
    """trunk(frozen) + adapted - frozen + ladder(adapted, projected taps), from stock parts."""
    model = side_model(cloud, lora_dropout=0.0)
    disturb(model)
    ids_1N = torch.arange(60, 70)[None]
    found = model(input_ids=ids_1N).logits

    whole = save_model(folder)  # the same weights
    with torch.no_grad():
        states = whole(input_ids=ids_1N, output_hidden_states=True).hidden_states
        bottom = adapted(save_model(folder), layers_to_transform=[0, 1, 4, 5], lora_dropout=0.0)
        bottom.load_state_dict({n: t for n, t in model.state_dict().items() if "lora" in n}, strict=False)
        adapted_1ND = bottom(input_ids=ids_1N, output_hidden_states=True).hidden_states[2]
        side = side_of(model)
        assert side is not None
        assert side.ladder is not None
        assert side.plan.taps == (2, 3)
        (projection,) = cloud.backbone.projections.values()
        taps = [projection(block, states[block + 1][0]) for block in side.plan.taps]
        table = SegmentTable(Segments((10,), torch.arange(10)), torch.device("cpu"))
        change = adapted_1ND - states[2] + side.ladder(adapted_1ND[0], taps, table)
        hidden = states[4] + change
        inner = bottom.get_base_model().model
        positions = torch.arange(10)[None]
        for block in inner.layers[4:]:
            hidden = block(
                hidden, attention_mask=None, position_embeddings=inner.rotary_emb(hidden, positions)
            )
        logits = bottom.get_base_model().lm_head(inner.norm(hidden))
    assert torch.allclose(found, logits, atol=1e-4)
    assert not torch.allclose(found, whole(input_ids=ids_1N).logits, atol=1e-2)


def test_gradients_reach_everything_that_is_trained_and_nothing_else(cloud: InProcessCloud) -> None:
    model = side_model(cloud).train()
    disturb(model)
    model(**batch()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == trained
    assert {name.split(".layers.")[1][0] for name in trained} == {"0", "1", "2", "4", "5"}
    assert all("lora_" in name or ".ladder." in name for name in trained)
    (usage,) = [run for run in _usage(cloud) if run.run == _run_of(model)]
    assert (usage.forward_steps, usage.backward_steps) == (1, 0)


def _run_of(model: peft.PeftModel) -> str:
    side = side_of(model)
    assert side is not None
    return side.parts.trunk.stepper.run


def _usage(cloud: InProcessCloud) -> list[Any]:
    return cloud.ledger.usage("insecure/edge", None)


def losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in read_ledger(run.ledger) if row["row"] == "optimizer_step"]


def test_training_changes_no_bit_of_what_crosses(cloud: InProcessCloud) -> None:
    """And without the side path it does."""

    def sent(model: peft.PeftModel) -> list[Tensor]:
        stepper = next(m for m in model.modules() if hasattr(m, "stepper")).stepper
        found: list[Tensor] = []
        submit = stepper.submit

        def record(hidden_ND: Tensor, segments: Segments, **options: Any) -> Flight:
            found.append(hidden_ND.clone())
            flight: Flight = submit(hidden_ND, segments, **options)
            return flight

        stepper.submit = record
        model.eval()
        with torch.no_grad():
            model(**batch())
        return found

    model = side_model(cloud)
    before = sent(model)
    disturb(model)
    assert torch.equal(before[0], sent(model)[0])
    other = adapted(plain(cloud)[0])
    cuts: list[Tensor] = []
    below_cut = other.get_base_model().get_submodule("model.layers.1")
    below_cut.register_forward_hook(lambda module, args, out: cuts.append(out))
    for _ in range(2):
        with torch.no_grad():
            other(**batch())
        disturb(other)
    assert not torch.allclose(cuts[0], cuts[1], atol=1e-3)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_the_cache_changes_no_bit(cloud: InProcessCloud, tmp_path: Path, codec: str) -> None:
    def run(name: str, **changes: Any) -> tuple[list[float], bytes, int]:
        recipe = cached_recipe(tmp_path / name, mode="side", side=SIDE, codec=codec, **changes)
        result, crossing = train_over(cloud, recipe)
        return losses(result.folder), _weights(result.folder), len(crossing.rows)

    cached, fetched = run("a"), run("b", cache={"enabled": False})
    assert cached[:2] == fetched[:2]
    assert (cached[2], fetched[2]) == (8, 24)


def _weights(run: RunFolder) -> bytes:
    return b"".join((run.adapter / f"{name}.safetensors").read_bytes() for name in ("adapter_model", "side"))


def test_a_resumed_run_is_the_same_to_the_last_bit(cloud: InProcessCloud, tmp_path: Path) -> None:
    whole, _ = train_over(cloud, cached_recipe(tmp_path / "a", mode="side", side=SIDE))
    recipe = cached_recipe(tmp_path / "b", mode="side", side=SIDE)
    train_over(cloud, recipe)
    for step in (16, 24):
        (tmp_path / "b" / "runs" / "run" / "checkpoints" / f"step-{step}" / "manifest.json").unlink(
            missing_ok=True
        )
    resumed, crossing = train_over(cloud, recipe, resume=True)
    assert _weights(resumed.folder) == _weights(whole.folder)
    assert crossing.rows == []  # the cache is there


def test_another_ladder_is_another_cache_entry_but_not_another_bottom(
    cloud: InProcessCloud, tmp_path: Path
) -> None:
    shared = {"cache": {"dir": str(tmp_path / "shared")}}

    def crossed(name: str, **changes: Any) -> int:
        return len(train_over(cloud, cached_recipe(tmp_path / name, **(shared | changes)))[1].rows)

    assert crossed("top") == 8
    assert crossed("no-ladder", mode="side", side={"taps": 0}) == 0  # the rows that mode top keeps
    assert crossed("side", mode="side", side=SIDE) == 8
    assert crossed("narrow", mode="side", side={**SIDE, "width": 8}, adapter={"r": 4}) == 0
    assert crossed("one-tap", mode="side", side={**SIDE, "taps": 1}) == 8


def test_it_learns_more_than_the_top_alone(tmp_path: Path) -> None:
    """Successors of numbers, on a backbone whose random blocks do something: each part lowers the loss."""
    model = tiny_llama(num_hidden_layers=6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "public.txt").write_text(TEXT, encoding="utf-8")
    fit = ProjectionOptions(file=tmp_path / "p.safetensors", text=tmp_path / "public.txt", size=4)
    train = {"epochs": 12, "checkpoint_every": 0}
    adapter = {"r": 2, "alpha": 4, "dropout": 0.0}

    def final(name: str, **changes: Any) -> float:
        recipe = cached_recipe(tmp_path / name, train=train, adapter=adapter, **changes)
        found = losses(train_over(strong, recipe)[0].folder)
        return sum(found[-8:]) / 8

    with InProcessCloud(tmp_path / "model", tmp_path / "cloud", projection=fit) as strong:
        top = final("top")
        bypass = final("bypass", mode="side", side={"taps": 0})
        ladder = final("ladder", mode="side", side={**SIDE, "adapt_bottom": False})
        both = final("both", mode="side", side=SIDE)
    assert max(bypass, ladder) < top - 0.05
    assert both < bypass - 0.05


def test_a_saved_side_network_loads_and_answers_the_same(cloud: InProcessCloud, tmp_path: Path) -> None:
    model = side_model(cloud).eval()
    disturb(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    save_side(tmp_path, model)
    again = peft.PeftModel.from_pretrained(plain(cloud)[0], tmp_path).eval()
    load_side(tmp_path, again, cloud.card)
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    assert side_of(again) is not None
    with pytest.raises(UsageError, match="has a side network"):
        load_side(tmp_path, again, cloud.card)


def test_a_run_leaves_a_side_network_that_loads(cloud: InProcessCloud, tmp_path: Path) -> None:
    recipe = cached_recipe(tmp_path, mode="side", side=SIDE, adapter={"r": 2, "dropout": 0.0})
    result, _ = train_over(cloud, recipe)
    model = peft.PeftModel.from_pretrained(plain(cloud)[0], result.folder.adapter).eval()
    side = load_side(result.folder.adapter, model, cloud.card)
    examples = load_examples(recipe.data.train, byte_tokenizer())
    with torch.no_grad():
        trained = float(model(**collate(examples[:8], 0)).loss)
        side.remove()
        assert trained < float(model(**collate(examples[:8], 0)).loss)
    assert "around the trunk" in (result.folder.adapter / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fingerprint": "ab" * 32}, FingerprintError, "belongs to the backbone abab"),
        ({"cut": "1:2"}, CutError, "trained at cut 1:2, this model has 2:2"),
        ({"projection": "cd" * 32}, FingerprintError, "projection cdcdcd"),
        ({"sha256": "00" * 32}, UsageError, "damaged"),
        ({"format": "tightbeam.side/2"}, UsageError, "of this version"),
        ({"width": 32}, UsageError, "damaged"),
    ],
)
def test_a_foreign_side_network_is_refused(
    cloud: InProcessCloud, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    save_side(tmp_path, side_model(cloud))
    facts = json.loads((tmp_path / "side.json").read_text())
    (tmp_path / "side.json").write_text(json.dumps(facts | change))
    model = plain(cloud)[0]
    with pytest.raises(error, match=message):
        load_side(tmp_path, model, cloud.card)
    assert side_of(model) is None  # left as it was
    assert side_parameters(model) == {}


def test_a_changed_file_is_refused(cloud: InProcessCloud, tmp_path: Path) -> None:
    save_side(tmp_path, side_model(cloud))
    raw = bytearray((tmp_path / "side.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "side.safetensors").write_bytes(raw)
    with pytest.raises(UsageError, match="damaged"):
        load_side(tmp_path, plain(cloud)[0], cloud.card)
    with pytest.raises(UsageError, match="of this version"):
        load_side(tmp_path / "absent", plain(cloud)[0], cloud.card)
    with pytest.raises(UsageError, match="no side network"):
        save_side(tmp_path, plain(cloud)[0])


def test_generate(cloud: InProcessCloud, folder: Path) -> None:
    ids_1N = torch.arange(60, 66)[None]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids_1N)}
    model = side_model(cloud).eval()
    whole: Any = save_model(folder)
    expected = whole.generate(input_ids=ids_1N, **options)
    assert torch.equal(model.generate(input_ids=ids_1N, **options), expected)
    disturb(model)
    found = model.generate(input_ids=ids_1N, **options)
    assert not torch.equal(found, expected)
    with torch.no_grad():
        logits = model(input_ids=found[:, :-1]).logits
    assert torch.equal(logits[0, 5:].argmax(-1), found[0, 6:])


@pytest.mark.parametrize("lora", [True, False])
def test_the_stock_trainer_trains_it(cloud: InProcessCloud, tmp_path: Path, lora: bool) -> None:
    model = adapted(plain(cloud)[0]) if lora else plain(cloud)[0]
    add_side(model, cloud.card, **LAYERS)
    rows = ragged_batch(8, 10, side="right", vocab=261)
    data = Dataset.from_dict({name: column.tolist() for name, column in rows.items()})
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=5, dataloader_pin_memory=False,
    )  # fmt: skip
    with torch.no_grad():
        before = float(model(**rows).loss)
    Trainer(model, arguments, train_dataset=data).train()
    with torch.no_grad():
        assert float(model.eval()(**rows).loss) < before - 0.1
    assert all(bool(p.any()) for name, p in side_parameters(model).items() if name.startswith("leave"))


def test_what_cannot_stay_frozen_is_refused(cloud: InProcessCloud) -> None:
    model = plain(cloud)[0]
    add_side(model, cloud.card, **LAYERS)
    next(model.model.layers[0].parameters()).requires_grad_(True)
    # without an adapter below, the bottom runs once and a gradient would have to go through it
    with pytest.raises(UsageError, match="Weights of the bottom itself"):
        model(**batch())
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = peft.get_peft_model(plain(cloud)[0], prompt)
    add_side(prompted, cloud.card, **LAYERS)
    with pytest.raises(UsageError, match="token ids"):
        prompted(**batch())


def test_a_cloud_without_projection_cannot_feed_a_ladder(folder: Path, tmp_path: Path) -> None:
    with InProcessCloud(folder, tmp_path) as bare:
        with pytest.raises(UsageError, match="offers no projection"):
            add_side(plain(bare)[0], bare.card)
        model = adapted(plain(bare)[0])
        side = add_side(model, bare.card, taps=0)
        assert (side.ladder, side_parameters(model)) == (None, {})
        with pytest.raises(UsageError, match="width 18 cannot have 4 heads"):
            add_side(plain(bare)[0], bare.card, width=18)


def test_taps_are_spread_over_the_trunk() -> None:
    assert choose_taps(range(4, 18), 8) == (5, 7, 8, 10, 12, 13, 15, 17)
    assert choose_taps(range(2, 4), 8) == (2, 3)
    assert choose_taps(range(4, 26), 1) == (25,)


def test_a_budget_counts_the_taps(cloud: InProcessCloud, tmp_path: Path) -> None:
    top = train_over(cloud, cached_recipe(tmp_path / "a"))[1]
    moved = sum(row.bytes.wire_total_bytes for row in top.rows)
    limits = {"train": {"max_mb": 1.3 * moved / 1e6}}
    for row in top.rows:
        assert row.bytes.payload_down_bytes == (row.tokens - row.shared_tokens) * 16 * 4
    with pytest.raises(BudgetError):
        train_over(cloud, cached_recipe(tmp_path / "c", mode="side", side=SIDE, **limits))


FLOPS: dict[str, dict[str, Any]] = {
    "top": {"mode": "top"},
    "side": {"mode": "side", "side": SIDE},
    "ladder": {"mode": "side", "side": {**SIDE, "adapt_bottom": False}},
    "bypass": {"mode": "side", "side": {**SIDE, "taps": 0}},
}


@pytest.mark.parametrize("mode", FLOPS)
def test_flops_are_those_that_torch_counts(cloud: InProcessCloud, tmp_path: Path, mode: str) -> None:
    """Two epochs from the cache of another run; torch sees matrix products and attention.

    The first of them runs the bare bottom where its rows are needed: a run of mode top has left none.
    """
    shared = {"cache": {"dir": str(tmp_path / "shared")}, "adapter": {"r": 2, "dropout": 0.0}}
    train_over(cloud, cached_recipe(tmp_path / "a", train={"epochs": 1}, **(shared | {"mode": "top"})))
    changes = FLOPS[mode]
    if mode != "bypass":
        train_over(cloud, cached_recipe(tmp_path / "b", train={"epochs": 1}, **shared, **changes))
    recipe = cached_recipe(tmp_path / "c", train={"epochs": 2}, **shared, **changes)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as c,
    ):
        result, crossing = train_over(cloud, recipe)
    assert crossing.rows == []
    rows = [row for row in read_ledger(result.folder.ledger) if row["row"] == "optimizer_step"]
    first, second = (sum(row["edge_flops"] for row in rows[part]) for part in (slice(8), slice(8, None)))
    assert first + second == pytest.approx(c.get_total_flops(), rel=1e-6)
    assert (first > 1.05 * second) == (mode == "bypass")
