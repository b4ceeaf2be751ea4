"""What a simulated client has: a network, a device and a budget, and what they make of bytes and FLOPs.

Time in a simulation is virtual. Seconds follow from counted bytes, round trips and operations, so they are
the same on every machine that runs the simulation, and a 4G client is slow although it runs here.

The throughput of a lossy path is that of one TCP stream: `MSS / RTT * sqrt(3 / (2 loss))` bytes a second
(Mathis, Semke, Mahdavi and Ott, 1997), or the line's bandwidth if that is less.
"""

import math
from collections.abc import Sequence

from pydantic import Field

from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.settings.sections import Section

__all__ = ["DEVICES", "NETWORKS", "Budget", "DeviceProfile", "NetworkProfile", "steps_seconds"]

_SEGMENT_BYTES = 1460  # of a TCP segment's payload on Ethernet


class NetworkProfile(Section):
    """One client's way to the cloud and to the federation's server."""

    up_mbps: float = Field(gt=0, description="Bandwidth from the client, 1e6 bits per second.")
    down_mbps: float = Field(gt=0, description="Bandwidth to the client, 1e6 bits per second.")
    rtt_ms: float = Field(ge=0, description="Round trip, milliseconds.")
    loss: float = Field(default=0.0, ge=0, lt=1, description="Share of packets that are lost, 0 to 1.")

    def seconds(self, *, up_bytes: int, down_bytes: int, round_trips: int) -> float:
        """Virtual seconds to move so many bytes in so many exchanges."""
        moving_s = up_bytes / self.up_bytes_per_s + down_bytes / self.down_bytes_per_s
        return round_trips * self.rtt_ms / 1e3 + moving_s

    @property
    def up_bytes_per_s(self) -> float:
        """Throughput from the client."""
        return self._bytes_per_s(self.up_mbps)

    @property
    def down_bytes_per_s(self) -> float:
        """Throughput to the client."""
        return self._bytes_per_s(self.down_mbps)

    def _bytes_per_s(self, mbps: float) -> float:
        line = mbps * 1e6 / 8
        if not self.loss or not self.rtt_ms:
            return line
        return min(line, _SEGMENT_BYTES / (self.rtt_ms / 1e3) * math.sqrt(1.5 / self.loss))


class DeviceProfile(Section):
    """One client's machine."""

    gflops: float = Field(gt=0, description="Sustained speed, 1e9 operations per second.")
    memory_mb: float = Field(gt=0, description="Memory for weights, adapter and optimizer, 1e6 bytes.")
    watts: float = Field(default=45.0, ge=0, description="Draw while it computes.")

    def seconds(self, flops: int) -> float:
        """Virtual seconds for so many operations."""
        return flops / (self.gflops * 1e9)


class Budget(Section):
    """The most one client spends in the whole experiment. What would go over it is not begun."""

    mb: float | None = Field(default=None, gt=0, description="Bytes on all wires, both directions, 1e6.")
    joules: float | None = Field(default=None, gt=0, description="Energy at the edge, joules.")
    money: float | None = Field(
        default=None, gt=0, description="Bill, in the currency of the cloud's prices."
    )
    degrade: list[str] = Field(
        default_factory=list,
        description="Codecs to fall back to, in this order, before the client leaves.",
    )

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return not (self.mb is None and self.joules is None and self.money is None)

    def exceeded_by(self, mb: float, joules: float, money: float) -> str:
        """Say which limit such totals break; nothing when all hold."""
        totals = {"MB": (self.mb, mb), "J": (self.joules, joules), "of money": (self.money, money)}
        broken = [
            f"{total:.3g} of {limit:.3g} {unit}"
            for unit, (limit, total) in totals.items()
            if limit is not None and total > limit
        ]
        return " and ".join(broken)


NETWORKS = {
    "4g": NetworkProfile(up_mbps=10, down_mbps=30, rtt_ms=50, loss=0.001),
    "home": NetworkProfile(up_mbps=20, down_mbps=100, rtt_ms=20, loss=0.0001),
    "fibre": NetworkProfile(up_mbps=500, down_mbps=500, rtt_ms=8),
    "lan": NetworkProfile(up_mbps=1000, down_mbps=1000, rtt_ms=0.5),
}
DEVICES = {
    "phone": DeviceProfile(gflops=30, memory_mb=2_000, watts=5),
    "laptop": DeviceProfile(gflops=200, memory_mb=8_000, watts=45),
    "desktop": DeviceProfile(gflops=1_000, memory_mb=32_000, watts=150),
    "gpu": DeviceProfile(gflops=20_000, memory_mb=16_000, watts=300),
}


def steps_seconds(network: NetworkProfile, rows: Sequence[StepRow], cloud_gflops: float) -> float:
    """Virtual seconds of steps: each row is one exchange, and the cloud computes between its two halves."""
    up = sum(row.bytes.wire_up_bytes for row in rows)
    down = sum(row.bytes.wire_down_bytes for row in rows)
    compute_s = sum(row.cloud_flops for row in rows) / (cloud_gflops * 1e9)
    return network.seconds(up_bytes=up, down_bytes=down, round_trips=len(rows)) + compute_s
