"""What a client tells of its work beside the adapter: bytes, operations, and what profiles make of them."""

import math
from collections.abc import Sequence
from typing import Any

from flwr.app import RecordDict

from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.edge.link.connection import Cloud
from tightbeam.federation.client import Work, held_bytes
from tightbeam.federation.client.participant import Client
from tightbeam.federation.profiles import steps_seconds

__all__ = ["backbone_facts", "cloud_flops", "counted", "figures_of", "weight_bytes_of"]


def cloud_flops(cloud: Cloud, cut: str, tokens: int, *, gradients: bool) -> int:
    """About what the cloud will compute, from the size of the trunk's weights; attention left out."""
    total = sum(size for name, size in _blobs(cloud).items() if not name.startswith("file/"))
    weights = (total - weight_bytes_of(cloud, cut)) // (4 if cloud.card.dtype == "float32" else 2)
    return (4 if gradients else 2) * tokens * weights


def weight_bytes_of(cloud: Cloud, cut: str) -> int:
    """Bytes of the weights that a client of this cut fetches once."""
    return held_bytes(_blobs(cloud), cut, cloud.card.num_blocks)


def backbone_facts(cloud: Cloud) -> dict[str, Any]:
    """What the report must know to say what the same experiment had cost otherwise."""
    card, sizes = cloud.card, {n: size for n, size in _blobs(cloud).items() if not n.startswith("file/")}
    return {
        "model": card.model,
        "fingerprint": card.fingerprint,
        "dtype": card.dtype,
        "num_blocks": card.num_blocks,
        "hidden_size": card.hidden_size,
        "weight_bytes": sum(sizes.values()),
    }


def _blobs(cloud: Cloud) -> dict[str, int]:
    return {blob.name: blob.num_bytes for blob in cloud.card.blobs}


def counted(rows: Sequence[StepRow]) -> dict[str, int | float]:
    """What the edge counted of these steps, however they ended."""
    moved = sum((row.bytes for row in rows), StepBytes())
    return {
        "tokens": sum(row.tokens for row in rows if row.kind == "forward"),
        "payload-up-bytes": moved.payload_up_bytes,
        "payload-down-bytes": moved.payload_down_bytes,
        "wire-up-bytes": moved.wire_up_bytes,
        "wire-down-bytes": moved.wire_down_bytes,
        "cloud-flops": sum(row.cloud_flops for row in rows),
    }


def figures_of(
    client: Client, content: RecordDict, work: Work, up_bytes: int, weight_bytes: int, slow: float
) -> dict[str, int | float]:
    """What the report is made of; seconds without `virtual` are this machine's own."""
    options = client.profile.options
    first = bool(content.config_records["config"]["first"])
    down_bytes = sum(record.count_bytes() for record in content.array_records.values())
    compute_s = options.device.seconds(work.edge_flops)
    exchange_s = options.network.seconds(up_bytes=up_bytes, down_bytes=down_bytes, round_trips=1)
    weights_s = options.network.seconds(up_bytes=0, down_bytes=weight_bytes * first, round_trips=first)
    steps_s = steps_seconds(options.network, work.rows, client.scenario.cloud.gflops)
    line_s = steps_seconds(options.network, work.rows, math.inf)  # of them, for the network
    return {
        **counted(work.rows),
        "loss": work.loss,
        "steps": work.steps,
        "tokens": work.tokens,  # whether they crossed or not
        "learned-tokens": work.learned_tokens,
        "weight-bytes": weight_bytes * first,
        "edge-flops": work.edge_flops,
        "wall-s": work.wall_s,
        "edge-s": work.edge_s,
        "network-s": sum(row.network_s for row in work.rows),
        "network-virtual-s": line_s,
        "memory-bytes": work.memory_bytes,
        "virtual-s": slow * (compute_s + steps_s + exchange_s) + weights_s,
        "joules": compute_s * options.device.watts,
    }
