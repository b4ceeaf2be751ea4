"""The one adapter that all clients share, as the server holds it and as each client gets it.

It covers the layers of every client, in float64, with the scale in B (see `federation.lora`). A client gets
the layers that its cut leaves at the edge, at its own rank and scale, in float32.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from tightbeam.common.federation import Arrays, LoraAdapter, parse_adapter
from tightbeam.common.federation.lowrank import best_rank, stack

__all__ = ["GlobalAdapter", "from_record", "layers_of", "to_record"]

_LEARNED, _FOLDED = "learned/", "folded/"


def to_record(arrays: Mapping[str, NDArray[np.floating]]) -> ArrayRecord:
    """Arrays as Flower carries them."""
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})


def from_record(record: ArrayRecord) -> dict[str, NDArray[np.floating]]:
    """Inverse of `to_record`."""
    return {name: array.numpy() for name, array in record.items()}


def layers_of(shapes: Mapping[str, Sequence[int]], origin: str) -> LoraAdapter:
    """Empty modules, rank 0, for tensors of these shapes and names."""
    probe = {
        name: np.zeros((1, shape[1]) if ".lora_A." in name else (shape[0], 1))
        for name, shape in shapes.items()
    }
    parsed = parse_adapter(probe, 1.0, origin)
    return LoraAdapter({layer: module.truncated(0) for layer, module in parsed.modules.items()}, {})


@dataclass(frozen=True, slots=True, eq=False)
class GlobalAdapter:
    """What has been learned, and what has been folded into the edges' own weights (flora only)."""

    learned: LoraAdapter
    folded: LoraAdapter | None = None

    @classmethod
    def initial(cls, layers: Sequence[LoraAdapter], rank: int, seed: int) -> Self:
        """Random A and zero B for the layers of all clients; the same for the same seed."""
        modules = {name: module for adapter in layers for name, module in adapter.modules.items()}
        return cls(LoraAdapter(modules, {}).resized(rank, seed))

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Inverse of `arrays`."""
        parts = {
            prefix: {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
            for prefix in (_LEARNED, _FOLDED)
        }
        folded = parse_adapter(parts[_FOLDED], 1.0, "the server") if parts[_FOLDED] else None
        return cls(parse_adapter(parts[_LEARNED], 1.0, "the server"), folded)

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Every factor in float64, to the last bit."""
        found = {_LEARNED + name: tensor for name, tensor in _factors(self.learned).items()}
        return found | {_FOLDED + name: tensor for name, tensor in _factors(self.folded).items()}

    def for_client(
        self, layers: Collection[str], rank: int, scale: float, seed: int
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        """The adapter that a client wears, and what it folds into its weights first, if anything."""
        resized = self.learned.resized(rank, seed)
        own = LoraAdapter({name: resized.modules[name] for name in sorted(layers)}, {})
        folds = {name: m for name, m in self.folded.modules.items() if name in layers} if self.folded else {}
        return own.state(scale), LoraAdapter(folds, {}).state(1.0)

    def after(self, learned: LoraAdapter) -> Self:
        """Replace the layers that a round has changed; layers of nobody in that round stay."""
        return replace(self, learned=LoraAdapter({**self.learned.modules, **learned.modules}, {}))

    def after_fold(self, stacked: LoraAdapter, rank: int, seed: int) -> Self:
        """Add a round's stack to what is folded, and start the adapter afresh.

        The stack is kept exactly, but never at a higher rank than its matrix can have.
        """
        modules = dict(self.folded.modules) if self.folded else {}
        for name, module in stacked.modules.items():
            joined = stack([modules[name], module], [1.0, 1.0]) if name in modules else module
            limit = min(joined.shape)
            modules[name] = best_rank(joined, limit) if joined.rank > limit else joined
        return replace(self, learned=self.learned.restarted(rank, seed), folded=LoraAdapter(modules, {}))

    def whole(self) -> LoraAdapter:
        """One adapter that has it all, to save: what is learned and what is folded, stacked."""
        if self.folded is None:
            return self.learned
        empty = {name: module.truncated(0) for name, module in self.learned.modules.items()}
        return LoraAdapter({**empty, **self.folded.modules}, {})


def _factors(adapter: LoraAdapter | None) -> dict[str, NDArray[np.float64]]:
    modules = adapter.modules.values() if adapter else ()
    pairs = ((m.names, (m.A_RI, m.B_OR)) for m in modules)
    return {name: tensor for names, tensors in pairs for name, tensor in zip(names, tensors, strict=True)}
