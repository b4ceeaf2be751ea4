"""The one adapter that all clients share, as the server holds it and as each client gets it.

It covers what every client shares, in float64, with the scale in B (see `federation.lora`): layers, and
ladders of mode side. A client gets its own of them, layers at its own rank and scale, in float32.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tightbeam.federation.contract.layers import fresh
from tightbeam.federation.math import Arrays, LoraAdapter, beyond, parse_adapter, plus
from tightbeam.federation.math.lowrank import best_rank, stack

__all__ = ["GlobalAdapter", "restricted"]

_LEARNED, _FOLDED = "learned/", "folded/"
_NOTHING = LoraAdapter({}, {})


@dataclass(frozen=True, slots=True, eq=False)
class GlobalAdapter:
    """What has been learned, and what all edges have folded into their own weights (flora only)."""

    learned: LoraAdapter
    folded: LoraAdapter | None = None

    @classmethod
    def initial(cls, layers: Sequence[LoraAdapter], rank: int, seed: int) -> Self:
        """A fresh start for what all clients share; the same for the same seed."""
        modules = {name: module for adapter in layers for name, module in adapter.modules.items()}
        rest = {name: tensor for adapter in layers for name, tensor in adapter.rest.items()}
        return cls(fresh(LoraAdapter(modules, rest), rank, seed))

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
        self, layers: Collection[str], rank: int, scale: float, seed: int, *, folds: bool = False
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        """The adapter that a client wears, and what it folds into its weights first, if anything.

        With `folds` that is all it does not wear, so that every client starts from the whole delta W.
        """
        own = restricted(self.learned.resized(rank, seed), layers)
        rest = plus(self.folded or _NOTHING, beyond(self.learned, rank)) if folds else _NOTHING
        return own.state(scale), restricted(rest, layers).state(1.0)

    def after(self, learned: LoraAdapter) -> Self:
        """Replace the layers that a round has changed; layers of nobody in that round stay."""
        modules = {**self.learned.modules, **learned.modules}
        return replace(self, learned=LoraAdapter(modules, {**self.learned.rest, **learned.rest}))

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
        """One adapter of all layers, to save: what is learned and what is folded."""
        if self.folded is None:
            return LoraAdapter(self.learned.modules, {})
        empty = {name: module.truncated(0) for name, module in self.learned.modules.items()}
        rest = plus(self.folded, beyond(self.learned, 0))
        return LoraAdapter({**empty, **rest.modules}, {})


def restricted(adapter: LoraAdapter, names: Collection[str]) -> LoraAdapter:
    """The layers and other tensors of these names."""
    modules = {name: m for name, m in sorted(adapter.modules.items()) if name in names}
    return LoraAdapter(modules, {name: tensor for name, tensor in adapter.rest.items() if name in names})


def _factors(adapter: LoraAdapter | None) -> dict[str, NDArray[np.float64]]:
    modules = adapter.modules.values() if adapter else ()
    pairs = ((m.names, (m.A_RI, m.B_OR)) for m in modules)
    found = {name: tensor for names, tensors in pairs for name, tensor in zip(names, tensors, strict=True)}
    return found | (adapter.rest if adapter else {})
