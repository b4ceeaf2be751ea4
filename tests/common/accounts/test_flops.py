"""The analytic FLOPs against torch's own counter, on real transformers blocks and PEFT models."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from support.tiny import tiny_model
from tightbeam.common.accounts.flops import EdgeFlops, TrunkFlops, attention_width, linear_params
from tightbeam.common.errors import UnsupportedModelError

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Wide enough that the matrix products that the formulas leave out (rotary angles) stay below 2 %.
WIDE = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "vocab_size": 211,
}
WIDE_GPT2 = {"n_embd": 128, "n_layer": 4, "vocab_size": 211}
WIDE_OPT = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 192, "num_hidden_layers": 4}
FAMILIES = {"llama": WIDE, "qwen3": WIDE, "gpt2": WIDE_GPT2, "phi3": WIDE, "opt": WIDE_OPT}

LORA_ON: dict[str, list[str] | str] = {
    "all": "all-linear",
    "queries and values": ["q_proj", "v_proj"],
    "MLP outputs": ["down_proj"],
}


def _wide(family: str) -> PreTrainedModel:
    return tiny_model(family, **FAMILIES[family])


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    count = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def _counted(work: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of `work` by torch's counter; the fused CPU kernel would hide attention, hence MATH."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = work()
    return int(counter.get_total_flops()), result


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_matches_the_counter(family: str) -> None:
    """The trunk of 1:1: blocks 1 and 2, frozen, their input requiring a gradient; one call per segment."""
    model = _wide(family).requires_grad_(False)
    trunk = list(_blocks(model))[1:3]
    _blocks(model)[0], _blocks(model)[3] = _Pass(), _Pass()
    lengths = [48, 7, 33]
    inputs = [torch.randn(1, n, 128, requires_grad=True) for n in lengths]
    base = model.base_model

    def run(hidden: Tensor) -> Tensor:
        output: Tensor = base(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return output

    forward, outputs = _counted(lambda: [run(hidden) for hidden in inputs])
    backward, _ = _counted(lambda: [output.sum().backward() for output in outputs])

    flops = TrunkFlops.from_blocks(trunk, model.config)
    ratios = flops.forward(lengths) / forward, flops.backward(lengths) / backward
    print(f"{family}: analytic/counter forward {ratios[0]:.4f}, backward {ratios[1]:.4f}")
    assert all(abs(ratio - 1) < 0.02 for ratio in ratios), ratios


class _Pass(nn.Module):
    """What stands at an empty position: returns the hidden state it is given."""

    attention_type = "full_attention"

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states


def _edge(model: PreTrainedModel, on: list[str] | str) -> nn.Module:
    """A PEFT model cut at 1:1."""
    for index in (1, 2):
        _blocks(model)[index] = _Pass()
    lora = peft.LoraConfig(r=8, target_modules=on, task_type="CAUSAL_LM")
    wrapped: nn.Module = peft.get_peft_model(model, lora)
    return wrapped.train()


@pytest.mark.parametrize(
    ("family", "on"),
    [
        ("llama", "all"),
        ("llama", "queries and values"),
        ("llama", "MLP outputs"),
        ("qwen3", "all"),
        ("qwen3", "queries and values"),
        ("gpt2", "all"),
        ("phi3", "all"),
        ("opt", "queries and values"),
    ],
)
# GPT-2 stores its weights transposed; PEFT says that it noticed.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_edge_matches_the_counter(family: str, on: str) -> None:
    model = _edge(_wide(family), LORA_ON[on])
    ids = _ids(3, 40)
    forward, output = _counted(lambda: model(input_ids=ids, labels=ids, use_cache=False))
    backward, _ = _counted(output.loss.backward)

    flops = EdgeFlops.from_model(model)
    ratios = flops.forward(3, 40) / forward, flops.backward(3, 40) / backward
    print(f"{family}, LoRA on {on}: analytic/counter forward {ratios[0]:.4f}, backward {ratios[1]:.4f}")
    assert all(abs(ratio - 1) < 0.02 for ratio in ratios), ratios


def test_edge_with_a_trainable_head_only() -> None:
    model = _wide("llama").requires_grad_(False)
    model.lm_head = nn.Linear(128, 211, bias=False)
    ids = _ids(2, 16)
    _, output = _counted(lambda: model(input_ids=ids, labels=ids, use_cache=False))
    backward, _ = _counted(output.loss.backward)
    assert EdgeFlops.from_model(model).backward(2, 16) == pytest.approx(backward, rel=0.02)


def test_fully_trainable_model() -> None:
    model = _wide("qwen3").train()
    ids = _ids(2, 16)
    _, output = _counted(lambda: model(input_ids=ids, labels=ids, use_cache=False))
    backward, _ = _counted(output.loss.backward)
    assert EdgeFlops.from_model(model).backward(2, 16) == pytest.approx(backward, rel=0.02)


def test_frozen_model_has_no_backward() -> None:
    flops = EdgeFlops.from_model(_wide("llama").requires_grad_(False))
    assert flops.forward(1, 8) > 0
    assert flops.backward(1, 8) == 0


def test_gradients_below_the_trunk_make_the_top_pay() -> None:
    """Negative control of the walk: where the adapter sits must change the bill."""

    def flops(layer: int) -> EdgeFlops:
        lora = peft.LoraConfig(r=8, target_modules=["down_proj"], layers_to_transform=[layer])
        return EdgeFlops.from_model(peft.get_peft_model(_wide("llama"), lora))

    bottom, top = flops(0), flops(3)
    assert bottom.forward_weights == top.forward_weights
    assert bottom.backward_weights > top.backward_weights
    assert top.backward_attention == 0


def test_linear_params_by_hand() -> None:
    block = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Embedding(7, 5))
    assert linear_params(block) == 15


def test_attention_width_without_head_dim() -> None:
    assert attention_width(_wide("gpt2").config) == 128
    assert attention_width(_wide("llama").config) == 4 * 32


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()])
def test_other_models_are_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="transformers"):
        EdgeFlops.from_model(model)
