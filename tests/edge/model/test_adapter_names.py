"""An adapter that was trained on the split model, by any method, means the same on the whole model."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from support.in_process import InProcessCloud
from support.tiny import tiny_model
from tightbeam.common.errors import UsageError
from tightbeam.edge import Cloud, connect

_IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
_Q: dict[str, Any] = {"target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def edge(tiny_cloud: Callable[[str], InProcessCloud]) -> Iterator[Cloud]:
    with connect(tiny_cloud("llama").address, insecure=True) as cloud:
        yield cloud


@pytest.fixture
def split(edge: Cloud) -> PreTrainedModel:
    return edge.load_model("1:2")


def _loss(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=_IDS, labels=_IDS).loss
    return loss


def _trained(split: PreTrainedModel, config: peft.PeftConfig) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(split, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # of LNTuning
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4),
        peft.LoraConfig(r=4, target_modules="all-linear", bias="all"),
        peft.LoraConfig(r=4, layers_to_transform=[0, 2, 5]),
        peft.LoraConfig(r=4, modules_to_save=["mlp"]),
        peft.LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.FourierFTConfig(n_frequency=10, **_Q),
        peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=8, **_Q),
        peft.C3AConfig(block_size=8, **_Q),
        peft.VeraConfig(r=4, **_Q),
        peft.OFTConfig(oft_block_size=4, **_Q),
        peft.LNTuningConfig(),
    ],
    ids=lambda config: f"{config.peft_type.value} {getattr(config, 'modules_to_save', None) or ''}",
)
@pytest.mark.filterwarnings(
    "ignore:Model has .tie_word_embeddings=True. and a tied layer is part of the adapter"
)
def test_any_method_means_the_same_on_the_whole_model(
    split: PreTrainedModel, tmp_path: Path, config: peft.PeftConfig
) -> None:
    trained = _trained(split, config)
    trained.save_pretrained(tmp_path, save_embedding_layers=False)
    whole = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(_loss(whole), _loss(trained), rtol=0, atol=1e-6)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(saved["target_modules"], list)  # serving engines take no expression
    assert all("." in name for name in saved["target_modules"])


def test_how_many_blocks_it_acts_on_is_said_once(
    split: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _trained(split, peft.LoraConfig(r=4, layers_to_transform=[0, 2, 3]))
    assert [record.message for record in caplog.records] == [
        "Adapter 'default' acts on 1 of 6 blocks: those at the edge."
    ]


@pytest.mark.parametrize(
    "config", [peft.LilyConfig(**_Q), peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2)]
)
def test_a_method_of_the_whole_model_is_refused(split: PreTrainedModel, config: peft.PeftConfig) -> None:
    with pytest.raises(UsageError, match="cannot be trained on a split model"):
        _trained(split, config)


def test_a_model_without_its_trunk_is_not_saved(split: PreTrainedModel, tmp_path: Path) -> None:
    merged: Any = _trained(split, peft.LoraConfig(r=4)).merge_and_unload()
    with pytest.raises(UsageError, match=r"has no trunk here.*To merge, load it on the whole model"):
        merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")
def test_a_tied_head_is_warned_of(split: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _trained(split, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    assert "lm_head, whose weight is both the embedding and the head here" in caplog.text
