"""An adapter section becomes a PEFT model whose saved adapter means the same on the whole model.

Target modules are resolved here against the blocks that are at the edge, as one regular expression: PEFT
would shorten a long list to the ends of its names. Once the layers are there, the config lists their names.
"""

import dataclasses
import inspect
import re
import warnings
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tightbeam.common.errors import RecipeError
from tightbeam.common.settings.messages import did_you_mean
from tightbeam.edge.model.adapter_names import WHOLE_MODEL_ONLY, block_of, name_layers
from tightbeam.edge.recipe import AdapterSection

__all__ = ["attach_adapter", "build_peft_config", "method_arguments", "resolve_targets"]

# Methods that no split model can train, and why.
_REFUSED = WHOLE_MODEL_ONLY | {
    "ADALORA": "it prunes ranks on a schedule of its own, which this training loop does not drive",
    "XLORA": "it mixes adapters that are already trained",
}
# The recipe's three dials under the names that methods give them.
_DIALS = {
    "r": ("r",),
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout", "vera_dropout", "rank_dropout", "module_dropout", "dropout"),
}


def attach_adapter(model: PreTrainedModel, section: AdapterSection, blocks: range | None = None) -> PeftModel:
    """Wrap the model with a fresh adapter, drawn from torch's current random state.

    `blocks` are those that get it; all that are at the edge if left out.

    Raises:
        RecipeError: see `build_peft_config`; also when PEFT refuses the combination.

    """
    config = build_peft_config(section, model, blocks)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 for a property under its former name.
            warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
            wrapped = peft.get_peft_model(model, config)
    # NotImplementedError: PEFT's word for a kind of layer that a method lacks
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(
            f"PEFT cannot put {section.method} on this model: {error}", cure="Change the adapter section."
        ) from error
    if isinstance(wrapped.base_model, BaseTuner):  # prompts have no layers to name
        name_layers(model, "default", wrapped.peft_config["default"])
    return wrapped


def build_peft_config(
    section: AdapterSection, model: PreTrainedModel, blocks: range | None = None
) -> PeftConfig:
    """Build the method's PEFT config.

    Raises:
        RecipeError: an unknown or impossible method, a dial that it does not have, an unknown argument in
            `extra`, or target modules that the model does not have.

    """
    config_class, known, arguments = method_arguments(section)
    method = config_class.__name__
    if "target_modules" in known:
        arguments["target_modules"] = resolve_targets(model, section.target_modules, blocks)
    elif blocks is not None:
        raise RecipeError(
            f"{method} acts below the top blocks, which this mode does not train.", cure="Use lora."
        )
    if "fan_in_fan_out" in known and any(isinstance(module, Conv1D) for module in model.modules()):
        arguments.setdefault("fan_in_fan_out", True)  # GPT-2 keeps its matrices transposed
    try:
        return config_class(**arguments)
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"The adapter section does not fit {section.method}: {error}", cure="Change it."
        ) from error


def method_arguments(section: AdapterSection) -> tuple[type[PeftConfig], set[str], dict[str, Any]]:
    """The method's config class, what that knows, and what the section gives it whatever the model.

    Raises:
        RecipeError: an unknown or impossible method, a dial or an argument in `extra` that it does not have.

    """
    config_class = _config_class(section.method)
    known = {field.name for field in dataclasses.fields(config_class) if field.init}
    method = config_class.__name__
    for name in section.extra:
        if name not in known:
            raise RecipeError(
                f"adapter.extra.{name} is no argument of {method}.{did_you_mean(name, sorted(known))}",
                cure=f"The PEFT documentation of {method} lists them.",
            )
    return config_class, known, {"task_type": "CAUSAL_LM", **_dials(section, known), **section.extra}


def _config_class(method: str) -> type[PeftConfig]:
    classes = {kind.value: cls for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = method.upper()
    if name in _REFUSED:
        raise RecipeError(
            f"adapter.method {method} cannot be trained here: {_REFUSED[name]}.", cure="Use lora."
        )
    if name not in classes:
        near = did_you_mean(method.lower(), [known.lower() for known in classes])
        raise RecipeError(
            f"adapter.method {method} is not known to PEFT {peft.__version__}.{near}",
            cure="DoRA is lora with extra: {use_dora: true}.",
        )
    found: type[PeftConfig] = classes[name]
    assert inspect.isclass(found)
    return found


def _dials(section: AdapterSection, known: set[str]) -> dict[str, Any]:
    arguments = {}
    for dial, names in _DIALS.items():
        value = getattr(section, dial)
        if value is None:
            continue
        name = next((name for name in names if name in known), None)
        if name is None:
            raise RecipeError(f"adapter.{dial}: {section.method} has no such dial.", cure=f"Take {dial} out.")
        # PEFT declares alpha as an integer; hand over a whole number as one so that saved configs agree.
        arguments[name] = int(value) if isinstance(value, float) and value.is_integer() and value else value
    return arguments


def resolve_targets(model: PreTrainedModel, targets: str | list[str], blocks: range | None = None) -> str:
    """Regular expression that matches exactly the full names of the target modules present at the edge.

    `all-linear` takes every linear layer but the output head; a list takes the modules whose name is an entry
    or ends with `.entry`, and every entry must find one.

    Raises:
        RecipeError: an entry finds no module.

    """
    names = {n: m for n, m in model.named_modules() if blocks is None or block_of(n) in blocks}
    linear = [name for name in _linear_names(model) if name in names]
    if targets == "all-linear":
        return _expression(linear)
    found: list[str] = []
    for target in targets:
        matches = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matches:
            leaves = sorted({name.rpartition(".")[2] for name in linear})
            raise RecipeError(
                f"adapter.target_modules: no {target} at the edge.{did_you_mean(target, leaves)}",
                cure=f"Linear layers here: {', '.join(leaves)}.",
            )
        found += matches
    return _expression(sorted(set(found), key=list(names).index))


def _linear_names(model: PreTrainedModel) -> list[str]:
    head: nn.Module | None = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _expression(names: list[str]) -> str:
    """Full names as one expression; blocks that have the same layers share a group, so it stays readable."""
    leaves_by_block: dict[tuple[str, str], list[str]] = {}
    plain: list[str] = []
    for name in names:
        block = re.fullmatch(r"(.*?\.)(\d+)\.(.*)", name)
        if block is None:
            plain.append(re.escape(name))
        else:
            leaves_by_block.setdefault((block[1], block[2]), []).append(re.escape(block[3]))
    blocks_by_leaves: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (prefix, index), leaves in leaves_by_block.items():
        blocks_by_leaves.setdefault((prefix, tuple(leaves)), []).append(index)
    grouped = [
        rf"{re.escape(prefix)}(?:{'|'.join(indices)})\.(?:{'|'.join(leaves)})"
        for (prefix, leaves), indices in blocks_by_leaves.items()
    ]
    return "|".join([*plain, *grouped])
