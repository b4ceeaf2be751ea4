"""Checkpoints whose weights transformers renames or fuses when it loads them.

A mixture of experts is stored expert by expert and computed fused; the text model of a multimodal checkpoint
lies under another prefix. Blobs are byte ranges of files, so transformers itself writes such a checkpoint
anew, once, into the cache folder, under the names of the model that runs.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.conversion_mapping import extract_weight_conversions_for_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tightbeam.common.backbone.checkpoint import AUXILIARY_FILES, Checkpoint
from tightbeam.common.backbone.families import check_family, refusing
from tightbeam.common.backbone.skeleton import build_skeleton, config_from_dict
from tightbeam.common.errors import UnsupportedModelError
from tightbeam.common.files import cache_folder

__all__ = ["open_checkpoint"]

_log = logging.getLogger(__name__)
_TEXT_MODEL = {r"^model\.language_model\.": "model.", r"^language_model\.": ""}


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint of the text model in `folder`, its tensors named as transformers' model names them.

    Raises:
        UnsupportedModelError: it holds no causal LM, or lacks weights.

    """
    checkpoint = Checkpoint(folder)
    config = config_from_dict(checkpoint.config)
    text = config.get_text_config()
    check_family(text)
    if text is config and not _renamed(checkpoint, config):
        return checkpoint
    place = cache_folder() / "converted" / _key(folder)
    if not place.is_dir():
        _log.info("converting the weights of %s into %s", folder, place)
        _convert(folder, text, place, composite=text is not config)
    return Checkpoint(place)


def _renamed(checkpoint: Checkpoint, config: PretrainedConfig) -> bool:
    model = build_skeleton(config, torch.float32)
    if extract_weight_conversions_for_model(model) is None:
        return False
    stored = set(checkpoint.tensors)
    tied = set(model.all_tied_weights_keys)
    return any(name not in stored | tied for name, _ in model.named_parameters())


def _key(folder: Path) -> str:
    files = sorted((*folder.glob("*.safetensors"), folder / "config.json"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    told = json.dumps([str(folder.resolve()), facts, transformers.__version__])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _convert(folder: Path, text: PretrainedConfig, place: Path, *, composite: bool) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    with refusing(text.model_type):
        model, found = kind.from_pretrained(
            folder, dtype="auto", key_mapping=_TEXT_MODEL if composite else None, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):
        raise UnsupportedModelError(
            f"The checkpoint lacks {len(missing)} weights, first {missing[0]!r}.",
            cure="Fetch the model again.",
        )
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        new = Path(temporary) / "model"
        model.save_pretrained(new, save_original_format=False)
        for name in AUXILIARY_FILES:
            if (folder / name).is_file() and not (composite and name == "config.json"):
                shutil.copyfile(folder / name, new / name)
        if composite:  # the same fingerprint whichever version of transformers wrote it
            values = json.loads((new / "config.json").read_text(encoding="utf-8"))
            values.pop("transformers_version", None)
            (new / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
        try:
            os.replace(new, place)
        except OSError:
            if not place.is_dir():  # else another process was first
                raise
