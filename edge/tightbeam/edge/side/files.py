"""A side network on disk: numbers in safetensors, and in JSON what they belong to.

side.safetensors    the ladder's parameters; absent when there is no ladder
side.json           backbone, cut, taps, projection and shape, and the SHA-256 of the other file

It lies beside the PEFT files of the blocks' adapter. That adapter alone is not the trained model: its bottom
blocks act around the trunk, not through it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from tightbeam.common.errors import CutError, FingerprintError, UsageError
from tightbeam.common.files import atomic_write
from tightbeam.edge.side.ladder import side_parameters
from tightbeam.edge.side.path import SidePath, SidePlan, plan_side, side_of, split_cut
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["load_side", "save_side", "write_side"]

_FORMAT = "tightbeam.side/1"
_NUMBERS, _FACTS = "side.safetensors", "side.json"


def save_side(folder: Path, model: PreTrainedModel | PeftModel) -> None:
    """Write the model's side network into a folder; the JSON comes last and makes it whole.

    Raises `UsageError` for a model without one, `TightbeamError` when it cannot be written.
    """
    side = side_of(model)
    if side is None:
        raise UsageError("This model has no side network.", cure="Make one with add_side().")
    write_side(folder, side.plan, {name: p.detach() for name, p in side_parameters(model).items()})


def write_side(folder: Path, plan: SidePlan, ladder: Mapping[str, Tensor]) -> None:
    """Write a side network of which there is no model here; raises `TightbeamError` as `save_side`."""
    digest = ""
    if ladder:
        data = save({name: tensor.cpu().contiguous() for name, tensor in ladder.items()})
        digest = hashlib.sha256(data).hexdigest()
        atomic_write(folder / _NUMBERS, data)
    facts = {"format": _FORMAT, **plan.facts(), "sha256": digest}
    atomic_write(folder / _FACTS, json.dumps(facts, indent=2) + "\n")


def load_side(folder: Path, model: PreTrainedModel | PeftModel, card: Card) -> SidePath:
    """Put a saved side network beside the trunk of a split model of the same cloud and cut.

    An adapter saved beside it is loaded first: `PeftModel.from_pretrained(model, folder)`.

    Raises:
        FingerprintError: Another backbone, or a projection that this cloud does not offer.
        CutError: The model has another cut.
        UsageError: The folder holds no side network, or a damaged one.
    """
    plan, digest = _read_plan(folder / _FACTS)
    if plan.fingerprint != card.fingerprint:
        raise FingerprintError(
            f"The side network {folder} belongs to the backbone {plan.fingerprint[:12]}, this cloud serves "
            f"{card.fingerprint[:12]}.",
            cure="Connect to the cloud that it was trained with.",
        )
    if (cut := split_cut(model)) != plan.cut:
        raise CutError(
            f"The side network {folder} was trained at cut {plan.cut}, this model has {cut}.",
            cure=f"Load the model with cut {plan.cut}.",
        )
    if plan.taps and plan.projection not in {offer.sha256 for offer in card.tap_offer.projections}:
        raise FingerprintError(
            f"The side network {folder} reads taps through the projection {plan.projection[:12]}, which "
            "this cloud does not offer.",
            cure="Its operator serves the old file with --projection FILE.",
        )
    side = plan_side(model, plan)
    try:
        _fill(side, folder / _NUMBERS, digest)
    except UsageError:
        side.remove()
        raise
    return side


def _read_plan(path: Path) -> tuple[SidePlan, str]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] == _FORMAT:
            return SidePlan.of(facts), facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(
        f"{path} does not describe a side network of this version.",
        cure="Give the folder that a run of mode side saved.",
    )


def _fill(side: SidePath, path: Path, digest: str) -> None:
    if side.ladder is None:
        return
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == digest:
            side.ladder.load_state_dict(load(data))
            return
    except (OSError, SafetensorError, RuntimeError):
        pass
    raise UsageError(f"{path} is damaged, or belongs to another {_FACTS}.", cure="Restore the folder.")
