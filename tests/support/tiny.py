"""Tiny random models of every tested family, and batches for them."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["PAD", "TINY", "ragged_batch", "scaled", "tiny_model"]

PAD = 2  # the end of text, as many tokenizers pad

_ROPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = _ROPE | {"query_pre_attn_scalar": 8, "sliding_window": 4}

TINY: dict[str, dict[str, Any]] = {
    "llama": _ROPE | {"tie_word_embeddings": True},
    "mistral": _ROPE | {"sliding_window": 4, "tie_word_embeddings": False},
    "qwen2": _ROPE | {"tie_word_embeddings": True},
    "qwen3": _ROPE | {"tie_word_embeddings": False},
    "gemma": _ROPE | {"tie_word_embeddings": True},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"sliding_window_pattern": 2},
    "phi3": _ROPE | {"tie_word_embeddings": False},
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 6,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "opt": {
        "vocab_size": 97,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of `family` with 6 blocks of width 32, with weights large enough to matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(TINY[family] | changes))
    return scaled(AutoModelForCausalLM.from_config(config))


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh model whose weights are large enough to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.eval()
    return model


def ragged_batch(batch: int, length: int, *, side: str, seed: int = 0, vocab: int = 97) -> dict[str, Tensor]:
    """`batch` sequences of different lengths padded on `side`; the first is full length.

    Labels are -100 at padding and at a first token after it: no token predicts that one. Padding is `PAD`,
    whose embedding is not zero.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, vocab, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        cut = int(torch.randint(1, length - 2, (1,), generator=generator))
        mask[row, slice(0, cut) if side == "left" else slice(length - cut, length)] = 0
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=1)
    labels = input_ids.masked_fill((mask == 0) | (before == 0), -100)
    return {"input_ids": input_ids.masked_fill(mask == 0, PAD), "attention_mask": mask, "labels": labels}
