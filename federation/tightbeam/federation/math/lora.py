"""LoRA adapters as the federation sees them: pairs of factors read from, and written to, PEFT's own names.

A client's adapter is a dict of arrays under the names of PEFT's files. `parse_adapter` turns it into modules,
each with A [r, in] and B [out, r], and the rest (a trained head, biases): what is not a pair of factors.

The one convention: **the scale lives in B**. PEFT adds `s * B @ A` to a weight, with s = alpha / r or, for
rsLoRA, alpha / sqrt(r). So clients with different ranks usually have different scales, and averaging their
factors as they lie in the files would weigh them by accident. Parsing multiplies B by its client's s, in
float64; `state` divides by the receiver's s. In between delta W is B @ A, whoever trained it, and the files
on both sides stay valid under their own configs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightbeam.common.errors import UpdateRefusedError

__all__ = ["Arrays", "LoraAdapter", "LoraModule", "Matrix", "fold", "parse_adapter"]

Arrays = Mapping[str, NDArray[np.floating[Any]]]
Matrix = NDArray[np.float64]

# Embedding layers name their factors lora_embedding_A and _B, without ".weight".
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(?P<tail>\.weight)?")


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """The factors of one layer. delta W [out, in] is B @ A: the scale is already in B."""

    names: tuple[str, str]  # of A and of B in PEFT's files
    A_RI: Matrix
    B_OR: Matrix

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return int(self.A_RI.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of delta W, (out, in); the same for every rank."""
        return int(self.B_OR.shape[0]), int(self.A_RI.shape[1])

    def with_factors(self, A_RI: Matrix, B_OR: Matrix) -> "LoraModule":
        """Return the same layer with other factors, of any common rank."""
        assert A_RI.shape[0] == B_OR.shape[1]
        return LoraModule(self.names, A_RI, B_OR)

    def delta_w(self) -> Matrix:
        """What the adapter adds to the layer's weight, [out, in]."""
        return self.B_OR @ self.A_RI

    def truncated(self, rank: int) -> "LoraModule":
        """Keep the first `rank` directions."""
        return self.with_factors(self.A_RI[:rank], self.B_OR[:, :rank])

    def padded(self, rank: int) -> "LoraModule":
        """Add directions of zeros up to `rank`; delta W stays the same."""
        more = max(0, rank - self.rank)
        return self.with_factors(
            np.pad(self.A_RI, ((0, more), (0, 0))), np.pad(self.B_OR, ((0, 0), (0, more)))
        )

    def resized(self, rank: int, rng: np.random.Generator) -> "LoraModule":
        """Truncate to `rank`, or widen to it with fresh random rows of A and zero columns of B.

        delta W does not change by widening, and the new directions can learn: with zeros in both factors
        neither would ever get a gradient. The rows are drawn as PEFT draws them, uniform within 1/sqrt(in).
        """
        if rank <= self.rank:
            return self.truncated(rank)
        wider, bound = self.padded(rank), 1 / np.sqrt(self.shape[1])
        A_RI = wider.A_RI.copy()
        A_RI[self.rank :] = rng.uniform(-bound, bound, A_RI[self.rank :].shape)
        return wider.with_factors(A_RI, wider.B_OR)


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """The modules by the name of their layer, and every other tensor by its own name, all in float64."""

    modules: dict[str, LoraModule]
    rest: dict[str, Matrix]

    @property
    def rank(self) -> int:
        """The largest rank of a module; 0 without modules."""
        return max((module.rank for module in self.modules.values()), default=0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What all clients must agree on: the layers with the shape of delta W, the rest with its own."""
        layers: dict[str, tuple[int, ...]] = {name: module.shape for name, module in self.modules.items()}
        return layers | {name: tensor.shape for name, tensor in self.rest.items()}

    def resized(self, rank: int, seed: int = 0) -> "LoraAdapter":
        """Every module at this rank, see `LoraModule.resized`.

        One seed gives all receivers the same fresh rows, and a smaller rank the first of a larger one's.
        """
        modules = {
            name: self.modules[name].resized(rank, np.random.default_rng([seed, number]))
            for number, name in enumerate(sorted(self.modules))
        }
        return LoraAdapter(modules, self.rest)

    def restarted(self, rank: int, seed: int = 0) -> "LoraAdapter":
        """Return a fresh start of this rank: random A, zero B, the rest kept. Its delta W is zero."""
        empty = {name: module.truncated(0) for name, module in self.modules.items()}
        return LoraAdapter(empty, self.rest).resized(rank, seed)

    def state(self, scale: float) -> dict[str, NDArray[np.float32]]:
        """Arrays under PEFT's names, sorted, for a receiver whose config says alpha / r = `scale`."""
        _require_scale(scale, "the receiver")
        arrays: dict[str, NDArray[np.float32]] = {}
        for module in self.modules.values():
            arrays[module.names[0]] = module.A_RI.astype(np.float32)
            arrays[module.names[1]] = (module.B_OR / scale).astype(np.float32)
        arrays |= {name: tensor.astype(np.float32) for name, tensor in self.rest.items()}
        # Flower's strategies pair some arrays by place, not by name: every record has the same order.
        return dict(sorted(arrays.items()))


def parse_adapter(state: Arrays, scale: float, client: str) -> LoraAdapter:
    """Read a client's arrays; `scale` is the alpha / r of its config.

    Raises:
        UpdateRefusedError: a tensor that is not finite, not of floats, a factor without its partner or with
            another rank or dimension than it. The message names the client and the tensor.

    """
    _require_scale(scale, client)
    factors: dict[str, dict[str, str]] = {}
    rest: dict[str, Matrix] = {}
    for name, tensor in state.items():
        _require_finite(tensor, name, client)
        match = _FACTOR.fullmatch(name)
        if match is None or match["kind"] == match["tail"]:  # neither a linear's name nor an embedding's
            rest[name] = tensor.astype(np.float64)
        else:
            factors.setdefault(match["module"], {})[match["factor"]] = name
    modules = {module: _pair(state, names, scale, client) for module, names in factors.items()}
    return LoraAdapter(modules, rest)


def _pair(state: Arrays, names: dict[str, str], scale: float, client: str) -> LoraModule:
    if len(names) != 2:
        (present,) = names.values()
        raise _refused(client, present, "comes without the other factor of its layer")
    A, B = state[names["A"]], state[names["B"]]
    for name, tensor in ((names["A"], A), (names["B"], B)):
        if tensor.ndim != 2:
            raise _refused(client, name, f"has shape {list(tensor.shape)}; factors of linear layers have two")
    if A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise _refused(
            client, names["B"], f"has shape {list(B.shape)}, which does not fit A's {list(A.shape)}"
        )
    return LoraModule((names["A"], names["B"]), A.astype(np.float64), B.astype(np.float64) * scale)


def fold(weight: NDArray[Any], module: LoraModule, *, transposed: bool = False) -> NDArray[Any]:
    """Return weight + delta W in the weight's own dtype, added in float64.

    `weight` is [out, in], or [in, out] with `transposed` (GPT-2's Conv1D keeps it so).
    """
    delta = module.delta_w().T if transposed else module.delta_w()
    assert weight.shape == delta.shape
    folded: NDArray[Any] = (weight.astype(np.float64) + delta).astype(weight.dtype)
    return folded


def _require_finite(tensor: NDArray[Any], name: str, client: str) -> None:
    if not np.issubdtype(tensor.dtype, np.floating):
        raise _refused(client, name, f"holds {tensor.dtype}, not floats")
    bad = int(tensor.size - np.count_nonzero(np.isfinite(tensor)))
    if bad:
        raise _refused(client, name, f"holds {bad} of {tensor.size} values that are NaN or infinite")


def _require_scale(scale: float, client: str) -> None:
    if not (np.isfinite(scale) and scale > 0):
        raise UpdateRefusedError(
            f"The scale of {client} is {scale}.", cure="It is alpha / r of the adapter's config, above zero."
        )


def _refused(client: str, name: str, why: str) -> UpdateRefusedError:
    return UpdateRefusedError(
        f"The update of {client} is refused: {name} {why}.",
        cure="The other clients' updates are not affected.",
    )
