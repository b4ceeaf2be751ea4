"""The backbone that this cloud serves: its trunk on the device, its other weights as blobs on disk."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tightbeam.cloud.projections import (
    ProjectionOptions,
    check_projection,
    projection_blob,
    provide_projection,
)
from tightbeam.common.backbone import (
    MAX_TAPS,
    PACKED_ATTENTION,
    Blob,
    CutPolicy,
    PackedTrunk,
    Projection,
    Segments,
    SelfTest,
    build_skeleton,
    config_from_dict,
    dissect,
    fill,
    fingerprint,
    open_checkpoint,
    refusing,
    resolve_model,
    self_test,
)
from tightbeam.common.devices import choose_device, choose_dtype
from tightbeam.common.errors import UsageError

__all__ = ["Backbone", "load_backbone"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backbone:
    """What `load_backbone` found and loaded."""

    name: str
    trunk: PackedTrunk
    policy: CutPolicy
    dtype: torch.dtype
    blobs: list[Blob]
    fingerprint: str
    config_json: str
    test: SelfTest
    blobs_by_hash: dict[str, Blob] = field(repr=False)
    projections: dict[str, Projection] = field(default_factory=dict)  # of taps, by SHA-256
    max_taps: int = MAX_TAPS  # in one step

    def graph_bytes(self, segments: Segments, span: range) -> int:
        """Estimate of what autograd keeps of one step.

        Attention that keeps its logits (softcap) adds them.
        """
        loaded = len(self.policy.loaded(self.trunk.num_blocks))
        linear: int = self.test.held_bytes_per_token * segments.num_tokens * len(span) // max(loaded, 1)
        if getattr(self.trunk.config, "attn_logit_softcapping", None) is None:
            return linear
        squares = sum(n * n for n in segments.lengths)
        heads = int(self.trunk.config.num_attention_heads)
        return linear + 5 * squares * heads * self.dtype.itemsize * len(span)


def load_backbone(
    model: str,
    policy: CutPolicy,
    *,
    device: str,
    dtype: str,
    projection: ProjectionOptions | None = None,
    max_taps: int = MAX_TAPS,
) -> Backbone:
    """Load the trunk of `model` (folder or hub id) onto the device, test it, and hash all weights.

    With `projection`, taps are offered through it as well as raw.

    Raises `UsageError` and its kin for what the operator can mend.
    """
    checkpoint = open_checkpoint(resolve_model(model))
    config = config_from_dict(checkpoint.config)
    on, as_dtype = choose_device(device), choose_dtype(dtype, checkpoint.dtype)
    skeleton = build_skeleton(config, as_dtype, PACKED_ATTENTION)
    with refusing(config.model_type):
        anatomy = dissect(skeleton)
    checkpoint.align(skeleton, anatomy)
    num_blocks = len(anatomy.blocks)
    loaded = policy.loaded(num_blocks)
    if not loaded:
        raise UsageError(
            f"The cut policy leaves no trunk of {num_blocks} blocks.", cure="Lower min_bottom or min_top."
        )

    def wanted(name: str) -> bool:
        if name.startswith(anatomy.blocks_path + "."):
            return int(name[len(anatomy.blocks_path) + 1 :].partition(".")[0]) in loaded
        return not name.startswith((anatomy.embedding_path + ".", anatomy.head_path + "."))

    fill(
        skeleton,
        lambda name: checkpoint.load(name) if name in checkpoint.tensors else None,
        wanted,
        as_dtype,
        on,
    )
    with refusing(config.model_type):
        trunk = PackedTrunk(skeleton)
        test = self_test(trunk, loaded, as_dtype)
    weights = checkpoint.weight_blobs(anatomy)
    blobs = weights + checkpoint.file_blobs()
    print_ = fingerprint(checkpoint.config, {blob.name: blob.sha256 for blob in weights})
    projections: dict[str, Projection] = {}
    if projection is not None:
        fitted = provide_projection(projection, checkpoint, trunk, loaded, print_)
        sha256 = fitted.sha256(projection.file.read_bytes())
        check_projection(fitted, trunk, loaded, as_dtype)
        projections[sha256] = fitted
        blobs.append(projection_blob(projection.file, sha256))
        _log.info("taps go through projection %s to %d elements", sha256[:12], fitted.size)
    _log.info("loaded blocks %d to %d of %s on %s as %s", loaded[0], loaded[-1], model, on, as_dtype)
    return Backbone(
        name=Path(model).name if Path(model).is_dir() else model,
        trunk=trunk,
        policy=policy,
        dtype=as_dtype,
        blobs=blobs,
        fingerprint=print_,
        config_json=json.dumps(checkpoint.config),
        test=test,
        blobs_by_hash={blob.sha256: blob for blob in blobs},
        projections=projections,
        max_taps=max_taps,
    )
