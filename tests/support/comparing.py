"""The split model beside the whole one: the same adapter on both, and how far they are apart."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

__all__ = [
    "GRADIENT_TOLERANCE",
    "LOSS_TOLERANCE",
    "Difference",
    "compare",
    "gradients",
    "greedy",
    "lora",
    "targets",
    "twins",
]

# Both sides compute in float32, but not in the same order: the whole model attends over padded rows with a
# mask and multiplies matrices of B*T rows, the trunk over each sequence alone and N rows. Sums of thousands
# of terms then differ in the last bit or two. One last bit of a loss between 4 and 8 is 4.8e-7. Gradients
# pass some ten such sums, whose errors of 1.2e-7 each add up to 1e-6 and, after cancellation, to a few times
# that.
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5  # relative, in the norm of one parameter's gradient

_TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of what was accumulated, by parameter; the model's own are cleared."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """Split against whole."""

    loss: float
    gradient: float  # the largest of all adapter parameters, relative to its norm in the whole model
    num_gradients: int


def targets(family: str) -> list[str]:
    """All linear layers in a block of `family`."""
    return _TARGETS.get(family, _LLAMA)


def lora(family: str, blocks: tuple[int, ...] = (0, 4, 5), **changes: Any) -> LoraConfig:
    """LoRA on every linear layer of the given blocks, with a B that is not zero."""
    options: dict[str, Any] = {"fan_in_fan_out": True} if family == "gpt2" else {}  # its layers are Conv1D
    options |= {"r": 4, "init_lora_weights": False, "layers_to_transform": list(blocks)}
    return LoraConfig(**(options | {"target_modules": targets(family)} | changes))


def twins(
    split: PreTrainedModel, whole: PreTrainedModel, config: PeftConfig, seed: int = 1
) -> tuple[PeftModel, PeftModel]:
    """The same random adapter on both."""
    torch.manual_seed(seed)
    here = get_peft_model(split, copy.deepcopy(config))  # PEFT writes into it
    torch.manual_seed(seed)
    there = get_peft_model(whole, copy.deepcopy(config))
    return here, there


def greedy(model: Any, prompts: dict[str, Tensor], num_tokens: int, **options: Any) -> Tensor:
    """Token ids of prompts and greedy answers."""
    ids: Tensor = model.generate(**prompts, max_new_tokens=num_tokens, do_sample=False, **options)
    return ids


def compare(split: PeftModel, whole: PeftModel, batch: dict[str, Any]) -> Difference:
    """One forward and backward of both; their gradients are gone afterwards."""
    losses = []
    for model in (split, whole):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
    references = dict(whole.named_parameters())
    apart = []
    for name, parameter in split.named_parameters():
        if parameter.grad is not None:
            expected = references[name].grad
            assert expected is not None
            apart.append(float((parameter.grad - expected).norm() / expected.norm().clamp_min(1e-12)))
    for model in (split, whole):
        model.zero_grad(set_to_none=True)
    return Difference(abs(losses[0] - losses[1]), max(apart), len(apart))
