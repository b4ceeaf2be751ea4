"""The card: what this cloud tells about itself before anything is sealed."""

from importlib.metadata import version

from tightbeam.cloud.backbone import Backbone
from tightbeam.common.backbone import max_positions
from tightbeam.common.wire.codecs import CODECS
from tightbeam.common.wire.records import PROTOCOL
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["make_card"]


def make_card(backbone: Backbone, max_tokens_per_step: int) -> pb.Card:
    """Everything but the key bundle, which changes with time, and the prices, which it signs."""
    trunk, policy = backbone.trunk, backbone.policy
    return pb.Card(
        protocol=PROTOCOL,
        version=version("tightbeam"),
        model=backbone.name,
        config_json=backbone.config_json,
        fingerprint=backbone.fingerprint,
        dtype=str(backbone.dtype).removeprefix("torch."),
        num_blocks=trunk.num_blocks,
        hidden_size=trunk.hidden_size,
        cut_policy=pb.CutPolicy(
            min_bottom=policy.min_bottom,
            min_top=policy.min_top,
            max_bottom=policy.max_bottom,
            max_top=policy.max_top,
        ),
        codecs=list(CODECS),
        limits=pb.Limits(
            max_tokens_per_step=max_tokens_per_step,
            max_positions=max_positions(trunk.config),
        ),
        tap_offer=pb.TapOffer(
            blocks=policy.loaded(trunk.num_blocks),
            max_taps=backbone.max_taps,
            projections=[
                pb.Projection(sha256=sha256, size=projection.size)
                for sha256, projection in backbone.projections.items()
            ],
        ),
        shared_prefixes=True,
        device=trunk.device().type,
        blobs=[pb.Blob(name=b.name, sha256=b.sha256, num_bytes=b.num_bytes) for b in backbone.blobs],
    )
