"""Adapter sections: any PEFT method, on the layers at the edge, meaning the same on the whole model."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from support.tiny import tiny_model
from tightbeam.common.errors import RecipeError
from tightbeam.edge.model.adapters import attach_adapter, build_peft_config, resolve_targets
from tightbeam.edge.recipe import AdapterSection

# PEFT 0.21 asks transformers 5.23 for a property under its former name, and wonders about RMS norms.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*LlamaRMSNorm:UserWarning"),
]

EDGE = {0, 5}  # of six blocks, as at cut 1:1


class PassThrough(nn.Module):
    """A trunk block as the edge has it: no weights, no work."""

    def forward(self, hidden_BTD: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_BTD


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    return next(
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 6
    )


def _without_trunk(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    blocks = _blocks(model)
    for number in set(range(6)) - EDGE:
        blocks[number] = PassThrough()
    return model


def _adapted(model: nn.Module) -> set[str]:
    return {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}


def _block_number(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    assert found
    return int(found[1])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "opt"])
def test_all_linear_takes_the_same_layers_as_on_the_whole_model(family: str) -> None:
    section = AdapterSection(r=2)
    split = _adapted(attach_adapter(_without_trunk(family), section))
    whole = _adapted(attach_adapter(tiny_model(family), section))
    by_peft = _adapted(
        peft.get_peft_model(
            tiny_model(family),
            peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=family == "gpt2"),
        )
    )
    assert whole == by_peft
    assert split == {name for name in whole if _block_number(name) in EDGE}
    assert split
    assert not any("head" in name for name in whole)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_adapter_grows_nothing_in_the_trunk_of_the_whole_model(tmp_path: Path, family: str) -> None:
    split = attach_adapter(_without_trunk(family), AdapterSection(r=2))
    split.save_pretrained(tmp_path, save_embedding_layers=False)
    whole = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)  # a missing key would warn
    assert _adapted(whole) == _adapted(split)


def test_ends_of_names_resolve_to_full_names_at_the_edge() -> None:
    model = _without_trunk("llama")
    expression = resolve_targets(model, ["q_proj", "mlp.up_proj"])
    matched = [name for name, _ in model.named_modules() if re.fullmatch(expression, name)]
    assert matched == [
        f"model.layers.{block}.{leaf}"
        for block in sorted(EDGE)
        for leaf in ("self_attn.q_proj", "mlp.up_proj")
    ]
    whole = [name for name, _ in tiny_model("llama").named_modules() if re.fullmatch(expression, name)]
    assert whole == matched


@pytest.mark.parametrize(
    "section",
    [
        AdapterSection(method="ia3"),
        AdapterSection(method="loha", r=2, alpha=2, dropout=0.1),
        AdapterSection(method="lokr", r=2),
        AdapterSection(method="oft", extra={"oft_block_size": 4, "use_cayley_neumann": False}),
        AdapterSection(method="vera", r=4, dropout=0.1),
        AdapterSection(method="ln_tuning", target_modules=["input_layernorm"]),
        AdapterSection(
            method="LoRA", r=2, alpha=8, dropout=0.1, extra={"use_dora": True, "use_rslora": True}
        ),
    ],
    ids=lambda section: section.method,
)
def test_methods_train_at_the_edge_only(section: AdapterSection) -> None:
    model = attach_adapter(_without_trunk("llama"), section)
    ids = torch.arange(3, 13)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_dials_carry_the_names_of_the_method() -> None:
    config: Any = build_peft_config(AdapterSection(r=4, alpha=8.0, dropout=0.25), tiny_model("llama"))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (4, 8, 0.25, "CAUSAL_LM")
    assert isinstance(config.lora_alpha, int)
    left_out: Any = build_peft_config(AdapterSection(), tiny_model("llama"))
    assert left_out.r == peft.LoraConfig().r


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (AdapterSection(method="lorra"), r"lorra is not known to PEFT .* Did you mean lora\?"),
        (AdapterSection(method="dora"), "extra: {use_dora: true}"),
        (AdapterSection(method="prefix_tuning"), "acts inside every block"),
        (AdapterSection(method="adalora"), "schedule of its own"),
        (AdapterSection(method="ia3", r=4), r"adapter\.r: ia3 has no such dial"),
        (
            AdapterSection(extra={"use_dorra": True}),
            r"use_dorra is no argument of LoraConfig\. Did you mean use_dora\?",
        ),
        (AdapterSection(target_modules=["q_prj"]), r"no q_prj at the edge\. Did you mean q_proj\?.*up_proj"),
        (AdapterSection(extra={"layers_to_transform": [0]}), "does not fit lora"),
    ],
)
def test_what_cannot_be_built_says_why(section: AdapterSection, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_peft_config(section, tiny_model("llama"))


def test_what_peft_refuses_on_the_model_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="PEFT cannot put lora on this model"):
        attach_adapter(tiny_model("llama"), AdapterSection(target_modules=["input_layernorm"]))
