"""Build the split model.

A true transformers model that holds bottom, top, embeddings and head; its trunk is remote.
"""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from tightbeam.common.backbone import Cut, VaryingRope, build_skeleton, config_from_dict, dissect, fill
from tightbeam.common.errors import ProtocolError, UnsupportedModelError
from tightbeam.edge.link.stepper import Stepper
from tightbeam.edge.model.adapter_names import NamesLayers, refuse_saving
from tightbeam.edge.model.calls import watch_calls
from tightbeam.edge.model.remote_trunk import PassThrough, RemoteTrunk
from tightbeam.edge.model.weights import BlobStore, local_source
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["build_split_model"]


def build_split_model(
    card: Card,
    cut: Cut,
    stepper: Stepper,
    store: BlobStore,
    *,
    dtype: torch.dtype,
    device: torch.device,
    local_path: Path | None = None,
) -> PreTrainedModel:
    """Instantiate only what stays at the edge and fill it from the cloud's blobs or a local checkpoint.

    The model generates without a key/value cache: the whole sequence goes through the cloud for every token.
    """
    config = config_from_dict(json.loads(card.config_json))
    model = build_skeleton(config, dtype)
    anatomy = dissect(model)
    if len(anatomy.blocks) != card.num_blocks:
        raise ProtocolError(f"The cloud's card says {card.num_blocks} blocks, its config otherwise.")
    span = cut.trunk(card.num_blocks)
    kinds = getattr(model.config, "layer_types", None) or [None] * card.num_blocks
    if local_path is not None:  # names all of a checkpoint's tensors, so the model must still be whole
        load = local_source(local_path, card, model, anatomy)
    else:
        held = {f"block.{i}" for i in range(card.num_blocks) if i not in span} | {"embedding", "head", "rest"}
        blobs = [blob for blob in card.blobs if blob.name in held]
        most = 8 * sum(tensor.numel() for tensor in model.state_dict().values()) + (len(blobs) << 20)
        if sum(blob.num_bytes for blob in blobs) > most:  # bytes a number, and a header a blob
            raise ProtocolError("The cloud's card names more bytes of weights than the model has room for.")
        load = store.source(blobs)
    trunk = RemoteTrunk(stepper, model.config, kinds[span[0]])
    for index in span:
        anatomy.blocks[index] = trunk if index == span[0] else PassThrough(kinds[index])
    fill(model, load, lambda name: True, dtype, device)
    trunk.rope = VaryingRope(model)
    watch_calls(model, anatomy)
    model.config.use_cache = False
    if model.generation_config is not None:
        model.generation_config = _generation_config(card, store, local_path) or model.generation_config
        model.generation_config.use_cache = False
        model.generation_config.cache_implementation = None
    model.register_forward_pre_hook(NamesLayers(card.num_blocks))
    model.save_pretrained = refuse_saving  # type: ignore[method-assign]  # of this model only
    model.name_or_path = model.config.name_or_path = card.model  # what PEFT writes beside an adapter
    return model


def _generation_config(card: Card, store: BlobStore, local_path: Path | None) -> GenerationConfig | None:
    """How the model's makers want it to generate and when to stop; None when they do not say."""
    name = "generation_config.json"
    if local_path is not None:
        file = local_path / name
    else:
        blob = next((blob for blob in card.blobs if blob.name == f"file/{name}"), None)
        if blob is None:
            return None
        file = store.get(blob)
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(file.parent, file.name)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"The model's {name} cannot be used: {error}", cure="Have its operator mend that file."
        ) from error
