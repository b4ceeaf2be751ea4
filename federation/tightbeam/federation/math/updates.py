"""What a client hands in, and the checks that stand between it and the global adapter.

One NaN or one tensor of another shape would spoil the mean for everybody. Each refusal names the client and
the tensor, so that a round can go on without this client and say why.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tightbeam.common.errors import CohortError, UpdateRefusedError
from tightbeam.federation.math.lora import Arrays, LoraAdapter, parse_adapter

__all__ = ["Cohort", "Update", "check_cohort", "check_update"]


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one client hands in after its local steps."""

    client: str
    weight: float  # examples or tokens, the same unit for all clients
    adapter: Arrays  # under PEFT's names
    scale: float  # alpha / r of the client's config; alpha / sqrt(r) for rsLoRA


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
    """Updates that fit each other: who, what, and the weights as shares that sum to one."""

    clients: tuple[str, ...]
    adapters: tuple[LoraAdapter, ...]
    shares: tuple[float, ...]


def check_update(update: Update, like: LoraAdapter) -> LoraAdapter:
    """Parse an update and hold it against the adapter that the client was sent; ranks may differ.

    Raises:
        UpdateRefusedError: see `parse_adapter`; or a tensor missing, unasked or of another shape; or a
            weight that is not above zero.

    """
    adapter = _parsed(update)
    _require_shapes(adapter, like.shapes(), update.client)
    return adapter


def check_cohort(updates: Sequence[Update]) -> Cohort:
    """Parse a round's updates and hold them against what most clients have: the first may be the odd one.

    Raises:
        CohortError: there are none.
        UpdateRefusedError: as `check_update`; or a client twice.

    """
    if not updates:
        raise CohortError("There is no update to aggregate.", cure="Every client failed: read their errors.")
    clients = [update.client for update in updates]
    for client, times in Counter(clients).items():
        if times > 1:
            raise UpdateRefusedError(f"{client} handed in {times} updates.", cure="Hand in one a round.")
    adapters = [_parsed(update) for update in updates]
    shapes = Counter(tuple(sorted(adapter.shapes().items())) for adapter in adapters)
    usual = dict(shapes.most_common(1)[0][0])
    for client, adapter in zip(clients, adapters, strict=True):
        _require_shapes(adapter, usual, client)
    total = sum(update.weight for update in updates)
    return Cohort(tuple(clients), tuple(adapters), tuple(update.weight / total for update in updates))


def _parsed(update: Update) -> LoraAdapter:
    if not (np.isfinite(update.weight) and update.weight > 0):
        raise UpdateRefusedError(
            f"The update of {update.client} is refused: its weight is {update.weight}.",
            cure="It is the number of examples or tokens that the client trained on.",
        )
    return parse_adapter(update.adapter, update.scale, update.client)


def _require_shapes(adapter: LoraAdapter, expected: Mapping[str, tuple[int, ...]], client: str) -> None:
    shapes = adapter.shapes()
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            why = f"{name} is missing"
        elif name not in expected:
            why = f"{name} is not a part of the shared adapter"
        elif shapes[name] != expected[name]:
            why = f"{name} is for shape {list(shapes[name])}, not {list(expected[name])}"
        else:
            continue
        raise UpdateRefusedError(
            f"The update of {client} is refused: {why}.",
            cure="All clients must adapt the same layers of the same backbone.",
        )
