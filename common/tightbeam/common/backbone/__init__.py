"""How a transformers model is cut and run on packed rows."""

from tightbeam.common.backbone.attention import PACKED_ATTENTION, SegmentTable, SharedRows, packed_attention
from tightbeam.common.backbone.checkpoint import Blob, Checkpoint, fingerprint
from tightbeam.common.backbone.converted import open_checkpoint
from tightbeam.common.backbone.cuts import Cut, CutPolicy
from tightbeam.common.backbone.families import FAMILIES, Anatomy, check_family, dissect, refusing
from tightbeam.common.backbone.hub import model_source, no_such_model, resolve_model
from tightbeam.common.backbone.packing import Packer, Segments
from tightbeam.common.backbone.rope import VaryingRope, max_positions
from tightbeam.common.backbone.selftest import SelfTest, self_test
from tightbeam.common.backbone.skeleton import build_skeleton, config_from_dict, fill
from tightbeam.common.backbone.taps import MAX_TAPS, PROJECTION_BLOB, Projection, Taps, tap_name
from tightbeam.common.backbone.trunk import PackedTrunk, Trunk

__all__ = [
    "FAMILIES",
    "MAX_TAPS",
    "PACKED_ATTENTION",
    "PROJECTION_BLOB",
    "Anatomy",
    "Blob",
    "Checkpoint",
    "Cut",
    "CutPolicy",
    "PackedTrunk",
    "Packer",
    "Projection",
    "SegmentTable",
    "Segments",
    "SelfTest",
    "SharedRows",
    "Taps",
    "Trunk",
    "VaryingRope",
    "build_skeleton",
    "check_family",
    "config_from_dict",
    "dissect",
    "fill",
    "fingerprint",
    "max_positions",
    "model_source",
    "no_such_model",
    "open_checkpoint",
    "packed_attention",
    "refusing",
    "resolve_model",
    "self_test",
    "tap_name",
]
