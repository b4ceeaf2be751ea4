"""Where a transformers causal LM keeps its blocks.

Any model is cut whose blocks sit in one `nn.ModuleList` of `num_hidden_layers` modules. Tested families are
in `FAMILIES`; other models are tried, and the cloud's self-test (`selftest.py`) refuses those that do not run
on packed rows. `REFUSED` names architectures known to fail, with the reason.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from tightbeam.common.errors import TightbeamError, UnsupportedModelError, printable

__all__ = ["FAMILIES", "REFUSED", "Anatomy", "check_family", "dissect", "refusing"]

FAMILIES = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt2",
        "gpt_neox",
        "opt",
    ),
    *("mixtral", "qwen3_moe", "deepseek_v3", "minicpm3"),
)

REFUSED = {
    "bloom": "its attention bypasses transformers' AttentionInterface and would leak across packed sequences",
    "falcon": "its attention does not look up transformers' AttentionInterface",
    "mamba": "it has no attention: its state would run across packed sequences",
    "mamba2": "it has no attention: its state would run across packed sequences",
    "gpt_oss": "its attention sinks are not supported on packed rows",
    "llama4_text": "it attends within chunks, and its temperature counts rows instead of positions",
    "gemma3n_text": "its blocks take inputs of their own beside the hidden states",
    "gemma4_text": "its blocks take inputs of their own beside the hidden states",
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of one model that a cut touches."""

    trunk_owner: nn.Module  # the module whose forward() iterates over the blocks
    blocks: nn.ModuleList
    blocks_path: str  # parameter prefix, e.g. "model.layers"
    embedding_path: str  # e.g. "model.embed_tokens"
    head_path: str  # e.g. "lm_head"


def check_family(config: PretrainedConfig) -> None:
    """Refuse by name, with the reason, what is known not to work."""
    name = config.model_type
    if reason := REFUSED.get(name):
        raise UnsupportedModelError(f"Models of type {name!r} cannot be cut: {reason}.", cure=_CURE)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name!r} is an encoder-decoder, not a causal LM.", cure=_CURE)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "Quantised checkpoints cannot be cut yet.", cure="Save a dequantised copy and serve that."
        )
    if unknown := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        raise UnsupportedModelError(
            f"Models of type {name!r} cannot be cut: {min(unknown)} does not keep packed sequences apart.",
            cure=_CURE,
        )


@contextmanager
def refusing(model_type: str) -> Iterator[None]:
    """Whatever an unknown architecture raises inside is a refusal that names it."""
    try:
        yield
    except (TightbeamError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a stranger's code: there is no list of what it may raise
        what = f"{type(error).__name__}: {printable(str(error), 200)}"
        raise UnsupportedModelError(
            f"Models of type {model_type!r} cannot be cut ({what}).",
            cure=_CURE,
        ) from error


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find the block list, its owner, the input embedding and the head."""
    num_blocks = model.config.num_hidden_layers
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(lists)} lists of {num_blocks} blocks; exactly one is needed.",
            cure=_CURE,
        )
    path, blocks = lists[0]
    paths = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no language-model head.", cure=_CURE)
    return Anatomy(
        trunk_owner=model.get_submodule(path.rpartition(".")[0]),
        blocks=blocks,
        blocks_path=path,
        embedding_path=paths[id(model.get_input_embeddings())],
        head_path=paths[id(head)],
    )


_CURE = f"Tested families: {', '.join(FAMILIES)}."
