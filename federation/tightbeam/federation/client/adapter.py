"""What a client trains, as arrays: worn before its work, taken off after it.

    PEFT's names                         the factors of the blocks at the edge
    ladder.<cut>.<digest>.<parameter>    of mode side; the digest is over all that gives a ladder its shape,
                                         so that only those of one kind ever have a name in common

Arrays are sorted into those below the cut, those above it and the ladder. Which of them are shared is the
client's choice (`shared`); the others are its own and stay.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tightbeam.common.errors import UpdateRefusedError
from tightbeam.edge.cache.shortcut import FrozenParts
from tightbeam.edge.model.remote_trunk import RemoteTrunk
from tightbeam.edge.side import SidePlan, save_side, side_of, side_parameters
from tightbeam.federation.contract.layers import LADDER, ladder_prefix
from tightbeam.federation.math import Arrays, LoraAdapter, LoraModule, fold

__all__ = ["SplitAdapter"]


class SplitAdapter:
    """The trained parameters of a split model: dressed with a client's arrays, undressed."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        (self.trunk,) = (module for module in model.modules() if isinstance(module, RemoteTrunk))
        self.parts = FrozenParts.of(model.get_base_model())
        # save_embedding_layers: PEFT would ask the model hub whether frozen embeddings changed
        lora: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
        ladder = {name: parameter.detach() for name, parameter in side_parameters(model).items()}
        self._tensors = lora | {self._ladder_name(name): tensor for name, tensor in ladder.items()}
        inside = {id(module) for part in self.parts.below for module in part.modules()}
        self.below = frozenset(name for name in lora if id(self._layer(name)) in inside)
        self._originals: dict[str, Tensor] = {}

    @property
    def weight_bytes(self) -> int:
        """Frozen weights and adapter held at the edge."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def training_bytes(self, optimizer: str) -> int:
        """What must fit in memory to train: weights, gradients and the optimizer's state; no activations."""
        copies = 3 if optimizer == "adamw" else 1
        return self.weight_bytes + copies * sum(4 * tensor.numel() for tensor in self._tensors.values())

    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name: of A [r, in], of B [out, r], of a ladder's tensors their own."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def padded(self, arrays: Arrays) -> Arrays:
        """These, and factors that change nothing for layers that they leave out."""
        return {name: np.zeros(shape) for name, shape in self.layers().items()} | dict(arrays)

    def shared(self, share: str) -> frozenset[str]:
        """Names of what goes to the server: "all", "top" (adapters above the trunk) or "none"."""
        if share == "all":
            return frozenset(self._tensors)
        top = {n for n in self._tensors if n not in self.below and not n.startswith(LADDER)}
        return frozenset(top if share == "top" else ())

    def wear(self, arrays: Arrays, folded: LoraAdapter | None = None) -> None:
        """Put on all of a client's arrays; `folded` is added to the frozen weights of its layers.

        Raises:
            UpdateRefusedError: other names or shapes than this model's.

        """
        self.undress()
        for name in sorted(self._tensors.keys() | arrays.keys()):
            own, given = self._tensors.get(name), arrays.get(name)
            if own is None or given is None or tuple(own.shape) != given.shape:
                shapes = [None if t is None else list(t.shape) for t in (own, given)]
                raise UpdateRefusedError(
                    f"The global adapter does not fit: {name} is {shapes[1]}, not {shapes[0]}.",
                    cure="Server and client must run the same scenario on the same backbone.",
                )
            own.copy_(torch.from_numpy(np.array(given, dtype=np.float32)))
        for layer, module in (folded.modules if folded else {}).items():
            self._fold(layer, module)

    def undress(self) -> None:
        """Take folded updates out again: the frozen weights belong to all clients."""
        for layer, original in self._originals.items():
            self._base(layer).weight.data = original
        self._originals = {}

    def arrays(self, *, only_B: bool = False) -> dict[str, NDArray[np.float32]]:
        """A copy of what is trained."""
        return {
            name: tensor.detach().cpu().float().numpy().copy()
            for name, tensor in self._tensors.items()
            if not only_B or ".lora_A." not in name
        }

    def learn(self, *, only_B: bool = False, only_above: bool = False) -> None:
        """Say what learns: everything worn, or B alone, or nothing below the cut."""
        below = {id(p) for part in self.parts.below for p in part.parameters()} if only_above else set[int]()
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(id(parameter) not in below and not (only_B and "lora_A" in name))

    def save(self, folder: Path) -> None:
        """Write what is worn as a folder that PEFT opens, a side network beside it; replaces an older one."""
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        self.model.save_pretrained(new, save_embedding_layers=False)
        if side_of(self.model) is not None:
            save_side(new, self.model)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)

    @property
    def side(self) -> SidePlan | None:
        """What its side network was built for, if it has one."""
        found = side_of(self.model)
        return None if found is None else found.plan

    def _ladder_name(self, parameter: str) -> str:
        assert self.side is not None
        return ladder_prefix(self.side) + parameter

    def _layer(self, name: str) -> nn.Module:
        layer: nn.Module = self.model.get_submodule(name.partition(".lora_")[0])
        return layer

    def _base(self, layer: str) -> nn.Module:
        module = self.model.get_submodule(layer)
        base = module.base_layer
        assert isinstance(base, nn.Linear | Conv1D)
        return base

    def _fold(self, layer: str, module: LoraModule) -> None:
        base = self._base(layer)
        original = base.weight.data
        assert isinstance(original, Tensor)
        self._originals[layer] = original
        folded = fold(original.float().cpu().numpy(), module, transposed=isinstance(base, Conv1D))
        base.weight.data = torch.from_numpy(folded).to(original)
