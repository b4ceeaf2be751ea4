"""The trained adapter as a folder that Hugging Face PEFT opens, with a card that says what it belongs to.

adapter_model.safetensors, adapter_config.json    PEFT's own two files
side.safetensors, side.json                       the side network of mode side, see tightbeam.edge.side
tightbeam.json                                    fingerprint of the backbone, cut, hash of the recipe
README.md                                         model card
"""

import json
import os
import shutil
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError

from tightbeam.common.files import sync_folder, write_failed
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.side import save_side, side_of
from tightbeam.edge.training.checkpoints import safetensors_os_error

__all__ = ["save_adapter"]

_CARD = """---
library_name: peft
base_model: {base}
tags: [{method}, tightbeam]
---

# {name}

A {method} adapter for `{base}`, trained with tightbeam at cut {cut}: the first {bottom} and the
last {top} blocks carry it.

    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model, "path/of/this/folder")

| | |
|---|---|
| backbone fingerprint (SHA-256 over config and weights) | `{fingerprint}` |
| recipe (SHA-256) | `{recipe}` |

The adapter was made from private data. A model can repeat what it was trained on: share it as
carefully as the data.
"""


_SIDE_CARD = """
This adapter was trained in mode side: it acts around the trunk, together with the side network beside it.
On the whole model it means something else. To use it:

    from peft import PeftModel
    from tightbeam.edge import connect
    with connect("HOST:PORT", identity="certs/NAME") as cloud:
        split = cloud.load_model("CUT")
        model = PeftModel.from_pretrained(split, "path/of/this/folder")
        cloud.load_side("path/of/this/folder", model)
"""


def save_adapter(path: Path, model: PeftModel, recipe: Recipe, fingerprint: str) -> Path:
    """Write the folder beside its place and move it there.

    Raises:
        TightbeamError: it could not be written; an older adapter in its place is intact.

    """
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    try:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        # Frozen embeddings need no saving, and PEFT's default would ask the model hub whether they changed.
        model.save_pretrained(new, save_embedding_layers=False)
        if side_of(model) is not None:
            save_side(new, model)
        _describe(new, model, recipe, fingerprint)
        for file in new.iterdir():
            with file.open("r+b") as handle:
                os.fsync(handle.fileno())
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise write_failed(path, safetensors_os_error(error)) from error
    shutil.rmtree(old, ignore_errors=True)
    return path


def _describe(folder: Path, model: PeftModel, recipe: Recipe, fingerprint: str) -> None:
    bottom, top = recipe.cut.split(":")
    base = model.get_base_model().config._name_or_path or "unnamed"
    card = _CARD.format(
        base=base,
        method=recipe.adapter.method,
        name=recipe.output.name,
        cut=recipe.cut,
        bottom=bottom,
        top=top,
        fingerprint=fingerprint or "not known",
        recipe=recipe.sha256(),
    )
    if side_of(model) is not None:
        card += _SIDE_CARD
    (folder / "README.md").write_text(card, encoding="utf-8")
    facts = {"backbone_fingerprint": fingerprint, "cut": recipe.cut, "recipe_sha256": recipe.sha256()}
    (folder / "tightbeam.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
