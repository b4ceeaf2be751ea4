"""The modes, one entry each: all that recipes, reports, `compare` and federations ask about a mode.

An entry holds facts and the name of the mode's class. The class is imported when a run is built, and not
before: a recipe is checked and a report is written without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Literal

from tightbeam.common.errors import RecipeError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tightbeam.edge.modes.base import Job, Mode
    from tightbeam.edge.recipe import Recipe, SideSection
    from tightbeam.edge.report.modes import Workload
    from tightbeam.proto.backbone_pb2 import Card

__all__ = [
    "MODES",
    "NUM_TAPS",
    "TAP_SHARE",
    "ModeSpec",
    "recipe_modes",
    "spec_of",
    "trained_blocks",
]

NUM_TAPS = 8
TAP_SHARE = 1 / 16
"""Width of a side-tuning tap as a share of the hidden size."""
_ONCE = "each example crosses once, then a local cache serves it"


@dataclass(frozen=True, kw_only=True)
class ModeSpec:
    """One mode."""

    name: str
    builds: str
    """Its class, a `tightbeam.edge.modes.base.Mode`, as `module:Class`."""
    builds_frozen: str = ""
    """The class for a client whose bottom is frozen already; the same one if left out."""
    crosses: Literal["never", "every step", "until frozen", "once"]
    """When a text crosses. Gradients cross in every step, or until the bottom is frozen."""
    trains_bottom: bool = True
    """Whether the bottom blocks have an adapter."""
    has_side: bool = False
    """Whether it trains a side network, by the section `side`; the bottom's change goes around the trunk."""
    needs_cloud: bool = False
    """Whether it is built after a cloud's card."""
    whole_model: bool = False
    """Whether every block is at the edge."""
    variant_of: str = ""
    """The `mode` that its recipes name, where that is another one: it is for `compare` and reports."""
    freezes_as: str = ""
    """The mode that it is with `train.freeze_bottom_after`; refuses that key if left out."""
    bytes_rule: str
    """Its payload in words, d being the hidden size; where texts cross once, of one pass."""
    assumes: str = ""
    """What a computed payload takes for granted."""
    payload: "Callable[[Workload], float] | None" = None
    """Bytes that a job moves in it; None where a job does not tell."""
    cloud_sees: str

    @property
    def gradients_cross(self) -> bool:
        """Whether some steps have a backward in the cloud."""
        return self.crosses in ("every step", "until frozen")

    @property
    def frozen_bottom(self) -> bool:
        """Whether all below the cut is frozen from the first step, or from some step on."""
        return self.crosses in ("until frozen", "once") and not self.has_side

    def adapts_bottom(self, side: "SideSection") -> bool:
        """Whether the bottom has an adapter, with this side network if the mode has one."""
        return side.adapt_bottom if self.has_side else self.trains_bottom

    def computed_rule(self) -> str:
        """The payload that a job has in it, in words."""
        return f"{self.rule()}; {self.assumes}" if self.assumes else self.rule()

    def rule(self, *, cached: bool = True) -> str:
        """Its payload in words; `cached` says whether what crossed was kept."""
        if self.crosses != "once":
            return self.bytes_rule
        return self.bytes_rule + (f"; {_ONCE}" if cached else " of every training step and evaluation")

    def extend(self, model: "PeftModel", card: "Card | None", side: "SideSection") -> None:
        """Give an adapted model what else the mode trains; raises `RecipeError` without a cloud it needs."""
        if card is not None:
            _loaded(self.builds).extend(model, card, side)
        elif self.needs_cloud:
            raise RecipeError(f"Mode {self.name} needs a cloud.", cure="Use another mode with a local model.")

    def build(self, job: "Job", start_step: int = 0, *, frozen: bool = False) -> "Mode":
        """The mode at work from `start_step` on; `frozen` says that the bottom learns no more."""
        return _loaded((frozen and self.builds_frozen) or self.builds)(job, start_step)


def _loaded(place: str) -> "type[Mode]":
    mode: type[Mode] = resolve_name(place)
    return mode


MODES: dict[str, ModeSpec] = {
    spec.name: spec
    for spec in (
        ModeSpec(
            name="ushape",
            builds="tightbeam.edge.modes.base:Mode",
            builds_frozen="tightbeam.edge.modes.top:FrozenBottom",
            crosses="every step",
            freezes_as="freeze",
            bytes_rule="4d per token of every training step, 2d of every evaluation",
            assumes="a backward taken as one forward's work",
            payload=lambda work: work.every_step,
            cloud_sees="hidden states of every text in every pass, and gradients at the cut",
        ),
        ModeSpec(
            name="freeze",
            builds="tightbeam.edge.modes.freeze:Freeze",
            crosses="until frozen",
            variant_of="ushape",
            bytes_rule=f"4d per token of every training step until the freeze, then 2d: {_ONCE}",
            cloud_sees="hidden states and gradients until the freeze, then each text's hidden states once",
        ),
        ModeSpec(
            name="top",
            builds="tightbeam.edge.modes.top:Top",
            crosses="once",
            trains_bottom=False,
            bytes_rule="2d per token",
            payload=lambda work: work.rows_once * work.row.forward,
            cloud_sees="hidden states of each text, once; no gradient",
        ),
        ModeSpec(
            name="side",
            builds="tightbeam.edge.modes.side:Side",
            crosses="once",
            has_side=True,
            needs_cloud=True,
            bytes_rule="2d and the taps per token",
            assumes=f"{NUM_TAPS} taps of d/{1 / TAP_SHARE:g}",
            payload=lambda work: work.rows_once * (work.row.forward + work.taps(NUM_TAPS, TAP_SHARE)),
            cloud_sees="hidden states of each text, once; no gradient",
        ),
        ModeSpec(
            name="local",
            builds="tightbeam.edge.modes.base:Mode",
            crosses="never",
            whole_model=True,
            variant_of="ushape",
            bytes_rule="no step crosses; the edge holds and computes every block, by its own electricity",
            payload=lambda work: 0.0,
            cloud_sees="nothing of the data",
        ),
    )
}


def recipe_modes() -> list[str]:
    """What `mode` may be in a recipe."""
    return [spec.name for spec in MODES.values() if not spec.variant_of]


def spec_of(recipe: "Recipe") -> ModeSpec:
    """The mode that a recipe asks for."""
    spec = MODES[recipe.mode]
    return spec if recipe.train.freeze_bottom_after is None else MODES[spec.freezes_as]


def trained_blocks(recipe: "Recipe", model: "PreTrainedModel") -> range | None:
    """The blocks that get the adapter; None for all that are at the edge."""
    from tightbeam.edge.cache.shortcut import FrozenParts

    return None if spec_of(recipe).adapts_bottom(recipe.side) else FrozenParts.of(model).top
