"""An adapter of the split model names each layer that it acts on: it means the same on the whole model.

PEFT takes layers by the ends of their names. Saved like that, an adapter of the edge's blocks would grow
layers in the trunk's blocks when the whole model loads it, untrained and for some methods not even zero.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.tuners.adaption_prompt import AdaptedAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from tightbeam.common.errors import UsageError

__all__ = ["WHOLE_MODEL_ONLY", "NamesLayers", "block_of", "name_layers", "refuse_saving"]

_log = logging.getLogger(__name__)
WHOLE_MODEL_ONLY = {
    "PREFIX_TUNING": "it acts inside every block, and the trunk's blocks are in the cloud",
    "CARTRIDGE": "it acts inside every block, and the trunk's blocks are in the cloud",
    "ADAPTION_PROMPT": "it acts inside every block, and the trunk's blocks are in the cloud",
    "LILY": "its layers share factors by their place among all blocks, and the trunk's are in the cloud",
}
"""PEFT methods that mean something else on the whole model, and why."""


class NamesLayers:
    """A forward pre-hook of the split model: it sees an adapter when it is used first."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._named: dict[str, PeftConfig] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it bare
    def __call__(self, model: PreTrainedModel, args: object) -> None:
        """Name the layers of adapters that were not there at the last forward."""
        configs: Mapping[str, PeftConfig] = getattr(model, "peft_config", None) or {}
        if not configs and any(isinstance(module, AdaptedAttention) for module in model.modules()):
            _refuse("ADAPTION_PROMPT")  # the one method that leaves no config behind
        for name, config in configs.items():
            if self._named.get(name) is not config:
                self._named[name] = config
                self._name(model, name, config)

    def _name(self, model: PreTrainedModel, adapter: str, config: PeftConfig) -> None:
        asked = getattr(config, "target_modules", None)
        layers = name_layers(model, adapter, config)
        blocks = {block_of(layer) for layer in layers} - {-1}
        if blocks and asked != set(layers):
            _log.warning(
                "Adapter %r acts on %d of %d blocks: those at the edge.",
                adapter,
                len(blocks),
                self._num_blocks,
            )


def name_layers(model: PreTrainedModel, adapter: str, config: PeftConfig) -> list[str]:
    """Write the full names of its layers into an adapter's config; they are returned.

    Raises:
        UsageError: a method that means something else on the whole model.

    """
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method in WHOLE_MODEL_ONLY:
        _refuse(method)
    layers = [name for name, module in model.named_modules() if _wears(module, adapter)]
    saved = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    ]
    values: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None}
    if layers:
        values["target_modules"] = set(layers)
    if feedforward := getattr(config, "feedforward_modules", None):
        ends = tuple([feedforward] if isinstance(feedforward, str) else feedforward)
        values["feedforward_modules"] = {name for name in layers if name.endswith(ends)}
    if any(block_of(name) >= 0 for name in saved):
        values["modules_to_save"] = saved
    for key, value in values.items():
        if hasattr(config, key):
            setattr(config, key, value)
    _warn_of_tied_head(model, layers)
    return layers


def block_of(name: str) -> int:
    """Index of the block that a module is in; -1 outside of blocks."""
    block = re.match(r".*?\.(\d+)\.", name)
    return int(block[1]) if block else -1


def refuse_saving(*args: object, **kwargs: object) -> NoReturn:
    """In the place of the split model's `save_pretrained`: its trunk is not here."""
    raise UsageError(
        "The split model has no trunk here: saved as a model, it would load with random blocks.",
        cure="Save the adapter: PeftModel.save_pretrained(folder). To merge, load it on the whole model: "
        "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder).merge_and_unload().",
    )


def _refuse(method: str) -> NoReturn:
    raise UsageError(
        f"{method} cannot be trained on a split model: {WHOLE_MODEL_ONLY[method]}.", cure="Use LoRA."
    )


def _wears(module: nn.Module, adapter: str) -> bool:
    if not isinstance(module, BaseTunerLayer):
        return False
    held = (getattr(module, name, None) for name in module.adapter_layer_names)
    return any(
        adapter in part for part in held if isinstance(part, Mapping | nn.ModuleDict | nn.ParameterDict)
    )


def _warn_of_tied_head(model: PreTrainedModel, layers: list[str]) -> None:
    if not model.config.get_text_config().tie_word_embeddings:
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if tied := [name for name in layers if model.get_submodule(name) in ends]:
        _log.warning(
            "The adapter changes %s, whose weight is both the embedding and the head here. Merged into "
            "a checkpoint, it changes both; loaded by PEFT, only the one.",
            " and ".join(tied),
        )
