"""What people do with a transformers model, done with the split one and with the whole one: the same numbers.

Adapters of several methods, saving, accumulation, checkpointing, the stock Trainer, TRL's SFTTrainer.
Over real gRPC on loopback unless a test says so.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel, Trainer, TrainingArguments

from support.comparing import GRADIENT_TOLERANCE, LOSS_TOLERANCE, compare, greedy, lora, targets, twins
from support.edge_runs import byte_tokenizer, tiny_llama
from support.in_process import InProcessCloud
from support.tiny import TINY, ragged_batch, tiny_model
from tightbeam.common.errors import UsageError
from tightbeam.edge import Cloud, connect

# After some optimizer steps the difference of a gradient's last bits has passed through Adam, which divides
# by the gradient's own size: it stays at some 1e-7 of the weights, and the loss moves with them.
_TRAINING_TOLERANCE = 1e-5

Clouds = Callable[[str], InProcessCloud]


@pytest.fixture
def llama(tiny_cloud: Clouds) -> Iterator[Cloud]:
    """A connection to the cloud of the tiny Llama."""
    with connect(tiny_cloud("llama").address, insecure=True) as cloud:
        yield cloud


def _blocks(method: type[PeftConfig], **options: Any) -> PeftConfig:
    return method(target_modules=r".*\.layers\.(0|4|5)\..*\.(q_proj|v_proj|down_proj)", **options)


@pytest.mark.parametrize(
    "config",
    [
        _blocks(LoraConfig, use_dora=True, r=4, init_lora_weights=False),
        _blocks(LoraConfig, use_rslora=True, r=4, init_lora_weights=False, modules_to_save=["lm_head"]),
        _blocks(IA3Config, feedforward_modules=r".*\.down_proj", init_ia3_weights=False),
        _blocks(LoHaConfig, r=4, init_weights=False),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["dora", "rslora+head", "ia3", "loha", "prompt"],
)
def test_other_methods_of_peft(llama: Cloud, config: PeftConfig) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)
        split, whole = twins(llama.load_model("1:2"), tiny_model("llama"), config)
    for side in ("left", "right"):
        difference = compare(split, whole, ragged_batch(5, 12, side=side))
        assert difference.loss <= LOSS_TOLERANCE
        assert difference.gradient <= GRADIENT_TOLERANCE


def test_prefix_tuning_is_refused(llama: Cloud) -> None:
    """It trains a key/value cache for every block, and the trunk's blocks are not here."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UsageError, match=r"cache does not reach into the cloud.*[Pp]refix tuning"):
        get_peft_model(llama.load_model("1:2"), config)(**ragged_batch(2, 8, side="right"))


@pytest.mark.parametrize("family", TINY)
def test_a_cache_is_refused(tiny_cloud: Clouds, family: str) -> None:
    prompts = ragged_batch(2, 8, side="left")
    del prompts["labels"]
    with connect(tiny_cloud(family).address, insecure=True) as cloud:
        model = cloud.load_model("1:2")
        with pytest.raises(UsageError, match=r"use_cache=False"):
            greedy(model, prompts, 3, use_cache=True)


def test_masks_that_cannot_be_packed_are_refused(llama: Cloud) -> None:
    model, batch = llama.load_model("1:2"), ragged_batch(2, 8, side="right")
    with pytest.raises(UsageError, match="2-D attention mask"):
        model(batch["input_ids"], attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(UsageError, match="covers the whole batch"):
        model(batch["input_ids"], attention_mask=torch.zeros(2, 8, dtype=torch.int64))


def test_holes_in_a_mask(tiny_cloud: Clouds) -> None:
    """Dropped tokens change no result, except under a sliding window, which would count them."""
    batch = ragged_batch(3, 12, side="right")
    for hole in (2, 3, 7):
        batch["attention_mask"][0, hole], batch["labels"][0, hole : hole + 2] = 0, -100
    with connect(tiny_cloud("llama").address, insecure=True) as cloud:
        split, whole = twins(cloud.load_model("1:2"), tiny_model("llama"), lora("llama"))
        difference = compare(split, whole, batch)
    assert difference.loss <= LOSS_TOLERANCE
    assert difference.gradient <= GRADIENT_TOLERANCE
    with connect(tiny_cloud("mistral").address, insecure=True) as cloud:
        model: Any = cloud.load_model("1:2")
        with pytest.raises(UsageError, match="Mask only padding"):
            model(**batch)


# PEFT looks for the base model's config under its name on the hub, to see whether the vocabulary grew
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning:peft")
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_saved_adapter_loads_on_the_whole_model(tiny_cloud: Clouds, family: str, tmp_path: Path) -> None:
    batch = ragged_batch(3, 12, side="right")
    with connect(tiny_cloud(family).address, insecure=True) as cloud:
        split = get_peft_model(cloud.load_model("1:2"), lora(family)).eval()
        split.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            here = split(**batch).logits
    whole = PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()
    with torch.no_grad():
        there, plain = whole(**batch).logits, tiny_model(family)(**batch).logits
    real = batch["attention_mask"].bool()
    # float32 sums in another order: some last bits of the largest logit
    bound = 1e-6 * float(there[real].abs().max())
    torch.testing.assert_close(here[real], there[real], rtol=0, atol=bound)
    assert (there - plain)[real].abs().max() > 1e-2  # the adapter does something


def _gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_gradients_accumulate(llama: Cloud) -> None:
    split, whole = twins(llama.load_model("1:2"), tiny_model("llama"), lora("llama"))
    for model in (split, whole):
        for seed in range(3):
            (model(**ragged_batch(2, 9, side="right", seed=seed)).loss / 3).backward()
    expected = _gradients(whole)
    for name, gradient in _gradients(split).items():
        assert (gradient - expected[name]).norm() <= GRADIENT_TOLERANCE * expected[name].norm()


def test_two_forwards_before_their_backwards(llama: Cloud) -> None:
    """The cloud keeps several steps of a run apart."""
    split, whole = twins(llama.load_model("1:2"), tiny_model("llama"), lora("llama"))
    for model in (split, whole):
        losses = [model(**ragged_batch(2, 9, side="left", seed=seed)).loss for seed in range(3)]
        (losses[0] + 2 * losses[1] + 3 * losses[2]).backward()
    expected = _gradients(whole)
    for name, gradient in _gradients(split).items():
        assert (gradient - expected[name]).norm() <= GRADIENT_TOLERANCE * expected[name].norm()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(llama: Cloud, use_reentrant: bool) -> None:
    model = get_peft_model(llama.load_model("1:2"), lora("llama")).train()
    batch = ragged_batch(3, 10, side="right")
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    plain = _gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(**batch).loss.backward()
    checkpointed = _gradients(model)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def _losses_of(model: PreTrainedModel | PeftModel) -> list[float]:
    losses: list[float] = []
    model.register_forward_hook(lambda module, args, out: losses.append(float(out.loss.detach())))
    return losses


def test_the_stock_trainer(llama: Cloud, tmp_path: Path) -> None:
    rows = ragged_batch(12, 10, side="right")
    data = Dataset.from_dict({name: column.tolist() for name, column in rows.items()})
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=6, per_device_train_batch_size=3, learning_rate=1e-2,
        gradient_accumulation_steps=2, report_to=[], save_strategy="no", disable_tqdm=True, seed=5,
        dataloader_pin_memory=False,
    )  # fmt: skip
    config = LoraConfig(r=4, target_modules=targets("llama"), layers_to_transform=[0, 4, 5], lora_dropout=0.1)
    split, whole = twins(llama.load_model("1:2"), tiny_model("llama"), config)
    losses = []
    for model in (split, whole):
        losses.append(_losses_of(model))
        Trainer(model, arguments, train_dataset=data).train()
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], abs=_TRAINING_TOLERANCE, rel=0)
    assert losses[0][-1] < losses[0][0] - 0.1  # it learns


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning"
)  # TRL's own default
def test_sft_trainer_of_trl(tmp_path: Path) -> None:
    """From messages to an adapter; tokenizer and weights come from the cloud."""
    from trl import SFTConfig, SFTTrainer

    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = Dataset.from_list(
        [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}" + "!" * (n % 5)} for n in range(12)]
    )
    config = LoraConfig(
        r=4, target_modules=targets("llama"), layers_to_transform=[0, 3], task_type="CAUSAL_LM"
    )
    arguments = SFTConfig(
        str(tmp_path / "out"), use_cpu=True, max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, bf16=False, max_length=64,
        dataloader_pin_memory=False,
    )  # fmt: skip
    with (
        InProcessCloud(tmp_path / "model", tmp_path / "cloud") as cloud,
        connect(cloud.listen(), insecure=True) as edge,
    ):
        losses = []
        for model in (edge.load_model("1:1"), tiny_llama()):
            torch.manual_seed(0)
            trainer = SFTTrainer(
                model,
                args=arguments,
                train_dataset=data,
                processing_class=edge.load_tokenizer(),
                peft_config=copy.deepcopy(config),  # PEFT writes into it
            )
            losses.append(_losses_of(trainer.model))
            trainer.train()
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=_TRAINING_TOLERANCE, rel=0)
    assert losses[0][-1] < losses[0][0]
