"""Analytic floating point operations of blocks, from the real modules' weights.

The convention is that of `torch.utils.flop_counter` on the math attention backend, so that the figures can
be checked against it: a multiply-add is two operations; attention is the full square without a causal
discount; element-wise work (norms, activations, rotary embeddings, softmax) is not counted. For a matrix of
`w` weights, N tokens in segments of n_i tokens, h query heads of size c:

    linear      forward 2 N w      input gradient 2 N w      weight gradient 2 N w
    attention   forward 4 h c sum(n_i^2)                     backward 8 h c sum(n_i^2)

The trunk is frozen and its input needs a gradient, so its backward is one input gradient per matrix. At the
edge a gradient is computed only where something trainable lies upstream, and only adapters have weight
gradients; `EdgeFlops` follows the order of execution to find out. Exact for dense decoder blocks with LoRA or
trainable layers; other adapters count for what they train as `nn.Linear`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tightbeam.common.errors import UnsupportedModelError

__all__ = ["EdgeFlops", "TrunkFlops", "attention_width", "linear_params"]

# Within attention and within the MLP these run after the projections beside them, whatever the order in which
# a family registers them.
_OUTPUT_PROJECTIONS = frozenset({"o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2"})
_AFTER_BLOCKS = ("norm", "ln_f", "final_layer_norm", "head", "score", "classifier", "project_out")


def linear_params(module: nn.Module) -> int:
    """Weight elements of all matrix multiplications in `module` (`nn.Linear` and GPT-2's `Conv1D`)."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | Conv1D))


def attention_width(config: Any) -> int:
    """Query heads times head size, of a transformers config."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * int(head_dim)


@dataclass(frozen=True)
class TrunkFlops:
    """FLOPs of frozen blocks whose input needs a gradient, on packed rows."""

    linear_weights: int
    """Weight elements of all matrices of all blocks."""
    attention_width: int
    """Query heads times head size, summed over the blocks."""

    @classmethod
    def from_blocks(cls, blocks: Sequence[nn.Module], config: Any) -> Self:
        """Count the matrices of `blocks`; `config` is the backbone's transformers config."""
        return cls(sum(map(linear_params, blocks)), len(blocks) * attention_width(config))

    def forward(self, lengths: Sequence[int]) -> int:
        """Count one forward pass over segments of `lengths` tokens."""
        return 2 * sum(lengths) * self.linear_weights + 4 * _squares(lengths) * self.attention_width

    def backward(self, lengths: Sequence[int]) -> int:
        """Count input gradients only; a forward that is run again because it was not held is not billed."""
        return 2 * sum(lengths) * self.linear_weights + 8 * _squares(lengths) * self.attention_width


@dataclass(frozen=True)
class EdgeFlops:
    """FLOPs of what stays at the edge: bottom blocks, top blocks, head and adapters, on padded batches."""

    forward_weights: int
    """Weight elements that every token is multiplied with in a forward pass."""
    backward_weights: int
    """The same for the backward pass, input and weight gradients together."""
    forward_attention: int
    """Operations per squared token of sequence length, forward."""
    backward_attention: int
    """The same for the backward pass."""

    @classmethod
    def from_model(cls, model: nn.Module) -> Self:
        """Follow the gradients through a transformers or PEFT model whose trunk positions are empty."""
        return cls(**_Walk(model).total())

    def forward(self, batch: int, length: int) -> int:
        """Count one forward pass over `batch` rows of `length` tokens, padding included."""
        return 2 * batch * length * self.forward_weights + batch * length**2 * self.forward_attention

    def backward(self, batch: int, length: int) -> int:
        """Count the backward pass of the same batch."""
        return 2 * batch * length * self.backward_weights + batch * length**2 * self.backward_attention


def _squares(lengths: Sequence[int]) -> int:
    return sum(n * n for n in lengths)


class _Walk:
    """One walk over a model in its order of execution, tracking where activations carry a gradient."""

    def __init__(self, model: nn.Module) -> None:
        base = getattr(model, "get_base_model", lambda: model)()  # PEFT wraps it; importing PEFT is for edges
        if not isinstance(base, PreTrainedModel):
            raise UnsupportedModelError(
                f"FLOPs are counted for transformers models, not for {type(base).__name__}.",
                cure="Pass what load_model() or get_peft_model() returned.",
            )
        self._width = attention_width(base.config)
        self._blocks_path, self._blocks = _block_list(model, base.config.get_text_config().num_hidden_layers)
        self._carries_grad = False
        self._forward_weights = self._backward_weights = 0
        self._forward_attention = self._backward_attention = 0
        before, after = self._split_rest(model)
        self._stage(before)
        for block in self._blocks:
            self._block(block)
        self._stage(after)

    def total(self) -> dict[str, int]:
        """Return the four sums, by field of `EdgeFlops`."""
        return {
            "forward_weights": self._forward_weights,
            "backward_weights": self._backward_weights,
            "forward_attention": self._forward_attention,
            "backward_attention": self._backward_attention,
        }

    def _split_rest(self, model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """Find what owns parameters outside the blocks: embeddings before them, final norm and head after."""
        rest = {n: m for n, m in _owners(model) if not n.startswith(self._blocks_path + ".")}
        after = {n: m for n, m in rest.items() if any(word in n for word in _AFTER_BLOCKS)}
        return {n: m for n, m in rest.items() if n not in after}, after

    def _block(self, block: nn.Module) -> None:
        owners = dict(_owners(block))
        matrices = {n: m for n, m in owners.items() if isinstance(m, nn.Linear | Conv1D)}
        if not matrices:
            return
        self._stage({n: m for n, m in owners.items() if n not in matrices})
        attention = {n: m for n, m in matrices.items() if "attn" in n or "attention" in n}
        mlp = {n: m for n, m in matrices.items() if n not in attention}
        self._attention({n: m for n, m in attention.items() if not _is_output(n)})
        self._stage({n: m for n, m in attention.items() if _is_output(n)})
        self._stage({n: m for n, m in mlp.items() if not _is_output(n)})
        self._stage({n: m for n, m in mlp.items() if _is_output(n)})

    def _attention(self, projections: dict[str, nn.Module]) -> None:
        """Query, key and value projections, then the two products whose gradients depend on who needs one."""
        grads = {
            letter: self._carries_grad or any(_trains(m) for n, m in projections.items() if _feeds(n, letter))
            for letter in "qkv"
        }
        self._stage(projections)
        scores = grads["q"] or grads["k"]
        products = grads["q"] + grads["k"] + grads["v"] + scores  # each is one product of 2 h c n^2
        self._forward_attention += 4 * self._width
        self._backward_attention += 2 * self._width * products

    def _stage(self, modules: dict[str, nn.Module]) -> None:
        """Modules that read the same activation; what they train carries a gradient to the next stage."""
        for name, module in modules.items():
            if isinstance(module, nn.Linear | Conv1D):
                self._matrix(module, follows_adapter="lora_B" in name)
        self._carries_grad |= any(_trains(m) for m in modules.values())

    def _matrix(self, module: nn.Linear | Conv1D, *, follows_adapter: bool) -> None:
        weights = module.weight.numel()
        self._forward_weights += weights
        trains = module.weight.requires_grad
        # lora_B reads what lora_A put out, which carries a gradient even where the layer's input does not.
        self._backward_weights += weights * (self._carries_grad or (follows_adapter and trains))
        self._backward_weights += weights * trains


def _owners(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold parameters of their own, adapters and the layers they wrap included."""
    return ((n, m) for n, m in root.named_modules() if any(True for _ in m.parameters(recurse=False)))


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _is_output(path: str) -> bool:
    return not _OUTPUT_PROJECTIONS.isdisjoint(path.split("."))


def _feeds(path: str, letter: str) -> bool:
    """Whether the projection at `path` makes queries, keys or values; a fused one makes all three."""
    separate = [f"{name}_proj" for name in "qkv"]
    own = [part for part in path.split(".") if part in separate]
    return not own or own[0] == f"{letter}_proj"


def _block_list(model: nn.Module, num_blocks: int) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks:
            return name, module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {num_blocks} blocks.",
        cure="Only decoder models whose blocks sit in one list can be split.",
    )
