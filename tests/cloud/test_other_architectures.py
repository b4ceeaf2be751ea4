"""Architectures beside the tested families: served exactly, or refused by name when the cloud starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from support.comparing import GRADIENT_TOLERANCE, LOSS_TOLERANCE, compare, lora, twins
from support.in_process import InProcessCloud
from support.tiny import TINY, ragged_batch, scaled
from tightbeam.cloud.backbone import load_backbone
from tightbeam.common.backbone import CutPolicy
from tightbeam.common.errors import UnsupportedModelError

_ROPE = TINY["llama"] | {"tie_word_embeddings": False}
_EXPERTS = _ROPE | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = _ROPE | {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 4}
_GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "experts, fused": ("mixtral", _EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
    "experts": ("qwen3_moe", _EXPERTS | {"num_experts": 4}),
    "shared experts": ("deepseek_v3", _EXPERTS | _LATENT | _GROUPS | {"first_k_dense_replace": 1}),
    "latent attention": ("deepseek_v3", _LATENT | _GROUPS | {"first_k_dense_replace": 6}),
    "values of another width": ("minicpm3", _LATENT | {"scale_emb": 1, "dim_model_base": 32}),
    "a renamed head": ("gpt_neox", _ROPE),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}, "'gptj' cannot be cut"),
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": 97, "hidden_size": 32, "num_layers": 6, "num_heads": 4}
        | {"attention_types": [[["global", "local"], 3]], "max_position_embeddings": 64},
        "'gpt_neo' cannot be cut",
    ),
    "mpt": ("mpt", {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 6}, "'mpt' cannot be cut"),
    "rwkv": ("rwkv", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 6}, "'rwkv' cannot be cut"),
    "gpt_bigcode": ("gpt_bigcode", _GPT, "GPTBigCodeForCausalLM does not tell its blocks the position_ids"),
    "bart": (
        "bart",
        {"vocab_size": 97, "d_model": 32, "decoder_layers": 6, "encoder_layers": 6}
        | {"decoder_attention_heads": 4, "decoder_ffn_dim": 48, "is_encoder_decoder": False},
        "BartForCausalLM does not tell its blocks the position_ids",
    ),
    "chunks longer than any test": (
        "llama4_text",
        _ROPE | {"attention_chunk_size": 8192, "num_local_experts": 2, "moe_layers": []},
        "'llama4_text' cannot be cut: it attends within chunks",
    ),
    "linear attention": ("qwen3_next", _EXPERTS | {"num_experts": 4}, "linear_attention does not keep"),
}


def _saved(folder: Path, family: str, changes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **changes))
    scaled(model).save_pretrained(folder)
    return model


def _assert_exact(folder: Path, whole: PreTrainedModel, targets: list[str]) -> None:
    with InProcessCloud(folder, folder.parent / "cloud") as cloud:
        config = lora("llama", target_modules=targets)
        here, there = twins(cloud.load_model(cloud.stepper("other")), whole, config)
        for batch in (ragged_batch(5, 12, side="left"), ragged_batch(3, 30, side="right"), _equal()):
            difference = compare(here, there, batch)
            assert difference.loss <= LOSS_TOLERANCE
            assert difference.gradient <= GRADIENT_TOLERANCE
            assert difference.num_gradients > 0


def _equal() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 94, (3, 11), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", SERVED)
def test_what_is_served_equals_the_whole_model(tmp_path: Path, kind: str) -> None:
    """Experts are stored one by one and computed fused: transformers renames them as it loads them."""
    family, changes = SERVED[kind]
    whole = _saved(tmp_path / "model", family, changes)
    leaves = {name.rpartition(".")[2] for name, module in whole.named_modules() if _linear(name, module)}
    _assert_exact(tmp_path / "model", whole, sorted(leaves))


def _linear(name: str, module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and (
        "layers.0.self_attn" in name or "layers.0.attention" in name
    )


def test_the_text_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=TINY["gemma3_text"],
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=96,
        boi_token_index=95,
        eoi_token_index=94,
    )
    torch.manual_seed(0)
    whole = scaled(Gemma3ForConditionalGeneration(config))
    whole.save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 94, (2, 30), generator=torch.Generator().manual_seed(1))
    with InProcessCloud(tmp_path / "model", tmp_path / "cloud") as cloud, torch.no_grad():
        split = cloud.load_model(cloud.stepper("text"))
        assert split.config.model_type == "gemma3_text"
        torch.testing.assert_close(split(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    family, changes, message = REFUSED[kind]
    _saved(tmp_path / "model", family, changes)
    with pytest.raises(UnsupportedModelError, match=message):
        load_backbone(str(tmp_path / "model"), CutPolicy.parse(""), device="cpu", dtype="auto")


def test_a_model_without_a_text_head_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="'vit' cannot be cut"):
        load_backbone(str(tmp_path / "model"), CutPolicy.parse(""), device="cpu", dtype="auto")


def test_a_conversion_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tightbeam.common.backbone import converted, open_checkpoint

    _saved(tmp_path / "model", *SERVED["experts"])
    first = open_checkpoint(tmp_path / "model")
    monkeypatch.setattr(converted, "_convert", None)  # a second one would fail
    assert open_checkpoint(tmp_path / "model").tensors == first.tensors
    assert "model.layers.0.mlp.experts.gate_up_proj" in first.tensors
