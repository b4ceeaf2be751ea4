"""How a transformers model is cut and run on packed rows."""

from tightbeam.common.backbone.attention import PACKED_ATTENTION, SegmentTable, packed_attention
from tightbeam.common.backbone.checkpoint import Blob, Checkpoint, fingerprint, resolve_model
from tightbeam.common.backbone.cuts import Cut, CutPolicy
from tightbeam.common.backbone.families import FAMILIES, Anatomy, check_family, dissect
from tightbeam.common.backbone.packing import Packer, Segments
from tightbeam.common.backbone.selftest import SelfTest, self_test
from tightbeam.common.backbone.skeleton import build_skeleton, config_from_dict, fill
from tightbeam.common.backbone.trunk import PackedTrunk, Trunk

__all__ = [
    "FAMILIES",
    "PACKED_ATTENTION",
    "Anatomy",
    "Blob",
    "Checkpoint",
    "Cut",
    "CutPolicy",
    "PackedTrunk",
    "Packer",
    "SegmentTable",
    "Segments",
    "SelfTest",
    "Trunk",
    "build_skeleton",
    "check_family",
    "config_from_dict",
    "dissect",
    "fill",
    "fingerprint",
    "packed_attention",
    "resolve_model",
    "self_test",
]
