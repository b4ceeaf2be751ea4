"""Build a transformers model without its weights, then fill in only the parts that one side holds.

Nothing of the process is changed on the way (torch's default dtype, `nn.Module`), as the usual contexts of
accelerate and transformers do: other threads may be loading models, or training.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tightbeam.common.backbone.bounds import judged_config
from tightbeam.common.backbone.families import check_family, refusing
from tightbeam.common.errors import UnsupportedModelError

__all__ = ["build_skeleton", "config_from_dict", "fill"]


def config_from_dict(values: Mapping[str, Any]) -> PretrainedConfig:
    """The config class of `model_type`; unknown types are refused by name."""
    rest = judged_config(values)
    model_type = rest.pop("model_type", None)
    if model_type not in CONFIG_MAPPING.keys():  # noqa: SIM118 - not a dict
        raise UnsupportedModelError(
            f"This transformers does not know models of type {model_type!r}.", cure="Upgrade transformers."
        )
    with refusing(model_type):
        config = AutoConfig.for_model(model_type, **rest)
    check_family(config)
    return config


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """The whole model with its parameters on the meta device (no memory) and its buffers real."""
    check_family(config)
    with refusing(config.model_type), _EmptyOnMeta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=None, attn_implementation=attention, trust_remote_code=False
        )
    model.config.dtype = dtype
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, dtype=dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty)
    model.eval()
    return model


class _EmptyOnMeta(TorchFunctionMode):
    """What a constructor leaves empty, its large weights, takes no memory. Of this thread only."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def fill(
    model: PreTrainedModel,
    load: Callable[[str], Tensor | None],
    wanted: Callable[[str], bool],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Load every parameter and saved buffer that `wanted(name)` names; `load` returns None for one it lacks.

    Raises `UnsupportedModelError` when a wanted parameter is still empty after tying.
    """
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        if wanted(name) and (tensor := load(name)) is not None:
            state[name] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
    model.load_state_dict(state, strict=False, assign=True)
    tied = model.all_tied_weights_keys  # where a checkpoint has both ends and they differ, they stay apart
    if state.keys() & {*tied, *tied.values()}:
        model.tie_weights(missing_keys=set(model.state_dict()) - state.keys(), recompute_mapping=False)
    _move_real(model, device)
    if missing := [name for name, p in model.named_parameters() if p.is_meta and wanted(name)]:
        raise UnsupportedModelError(
            f"The checkpoint lacks {len(missing)} weights, first {missing[0]!r}.",
            cure="Fetch the model again.",
        )
    model.requires_grad_(False)


def _move_real(model: nn.Module, device: torch.device) -> None:
    """Move what is not on the meta device; `Module.to` would fail on the rest."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
