"""`train.report_to`: what a run does, in TensorBoard, Weights & Biases or MLflow.

Losses, speed, bytes, money and energy, through accelerate's own trackers. Bytes, money and joules are sums
over the whole run, by the cloud's prices and the draw that docs/costs.md assumes; what came before a resumed
run is read from its ledger.
"""

import json
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from accelerate import PartialState
from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    WandBTracker,
    get_available_trackers,
)

from tightbeam.common.accounts.prices import PriceList, Tariff
from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.common.errors import RecipeError
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.events import Evaluated, Event, StepDone, Transferred
from tightbeam.edge.training.folder import RunFolder

__all__ = ["Trackers", "require_trackers"]


def require_trackers(names: Sequence[str]) -> None:
    """Raise `RecipeError` when the package of a tracker is not installed."""
    found = {str(name.value) for name in get_available_trackers()}
    if missing := [name for name in names if name not in found]:
        raise RecipeError(
            f"train.report_to names {missing[0]}, whose package is not installed.",
            cure=f"pip install {missing[0]}, or take it out of train.report_to.",
        )


class Trackers:
    """Listener that sends figures of steps and evaluations to trackers."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        *,
        first_step: int,
        prices: PriceList | None,
        devices: tuple[str, str],
    ) -> None:
        """Start the recipe's trackers; `devices` are the edge's and the cloud's."""
        self._tariff, self._devices = Tariff.of(prices).prices, devices
        self._moved, self._cloud_flops, self._cloud_s, self._edge_s = StepBytes(), 0, 0.0, 0.0
        self._trackers = [_started(name, recipe, folder, first_step) for name in recipe.train.report_to]
        for row in read_ledger(folder.ledger) if self._trackers and first_step else ():
            if row["row"] == "step":
                self._add(StepRow.from_json(row))
            elif row["row"] == "optimizer_step":
                self._edge_s += row["wall_s"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def __call__(self, event: Event) -> None:
        """Send what there is to say of an event."""
        match event:
            case Transferred():
                self._add(event.row)
            case StepDone():
                self._edge_s += event.wall_s
                figures = {
                    "train/loss": event.loss,
                    "train/lr": event.lr,
                    "train/grad_norm": event.grad_norm,
                    "train/epoch": event.epoch,
                    "train/tokens_per_s": event.tokens / max(event.wall_s, 1e-9),
                }
                self._log(figures | self._costs(), event.step)
            case Evaluated():
                self._log({"eval/loss": event.loss}, event.step)

    def _add(self, row: StepRow) -> None:
        self._moved = self._moved + row.bytes
        self._cloud_flops += row.cloud_flops
        self._cloud_s += row.cloud_compute_s

    def _costs(self) -> dict[str, float]:
        edge, cloud = self._devices
        energy = self._tariff.energy(
            edge_s=self._edge_s, cloud_compute_s=self._cloud_s, edge_device=edge, cloud_device=cloud
        )
        bill = self._tariff.bill(
            wire_bytes=self._moved.wire_total_bytes,
            cloud_flops=self._cloud_flops,
            edge_joules=energy.edge_joules,
        )
        return {
            "costs/up_bytes": self._moved.wire_up_bytes,
            "costs/down_bytes": self._moved.wire_down_bytes,
            f"costs/{self._tariff.currency}": bill.total,
            "costs/edge_joules": energy.edge_joules,
            "costs/cloud_joules": energy.cloud_joules,
        }

    def _log(self, figures: dict[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(figures, step=step)


def _started(name: str, recipe: Recipe, folder: RunFolder, first_step: int) -> GeneralTracker:
    PartialState()  # accelerate's trackers ask it whether they are the main process
    run = recipe.output.name
    if name == "tensorboard":
        # Steps after the checkpoint will be done again: TensorBoard drops what it has of them.
        tracker = TensorBoardTracker(
            "tensorboard", folder.path, purge_step=first_step + 1 if first_step else None
        )
    elif name == "wandb":
        tracker = WandBTracker("tightbeam", name=run, dir=str(folder.path))
    else:
        tracker = MLflowTracker("tightbeam", run_name=run)
    tracker.start()
    if name != "tensorboard":  # which would write a folder of its own for them
        tracker.store_init_configuration(_flat(recipe.numbers()))
    return tracker


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return flat
