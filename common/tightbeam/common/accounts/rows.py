"""The rows of the accounts: what one step cost, the same words on both sides.

`payload` is what the codec put out, `sealed` adds the records' tags and the sealed headers, `wire` adds the
framing of gRPC, HTTP/2 and TLS (see `wire_bytes`). `up` is edge to cloud. A step is billed once, by its
key `(tenant, run, step, kind)`; what a retry moved besides is `resent_bytes` and is not billed.

What a step was for only the edge knows; it never crosses.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

__all__ = ["Purpose", "StepBytes", "StepRow"]

Purpose = Literal["", "train", "evaluate", "fill"]
"""Why the edge took a step: for a training step, an evaluation, or its cache. "" where nobody said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBytes:
    """Bytes of one exchange, by layer and direction."""

    payload_up_bytes: int = 0
    payload_down_bytes: int = 0
    sealed_up_bytes: int = 0
    sealed_down_bytes: int = 0
    wire_up_bytes: int = 0
    wire_down_bytes: int = 0

    def __add__(self, other: "StepBytes") -> "StepBytes":
        return StepBytes(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def wire_total_bytes(self) -> int:
        """Both directions."""
        return self.wire_up_bytes + self.wire_down_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """One step of one kind, as either side saw it."""

    run: str
    step: int
    kind: str  # "forward" or "backward"
    tokens: int
    segments: int
    bytes: StepBytes
    cloud_flops: int
    shared_tokens: int = 0  # edge: of `tokens` those whose rows crossed as an earlier sequence's
    codec_s: float = 0.0
    seal_s: float = 0.0
    network_s: float = 0.0  # edge: waiting for the reply, less the cloud's own two figures
    cloud_queue_s: float = 0.0
    cloud_compute_s: float = 0.0
    resent_bytes: int = 0  # wire bytes of failed attempts, both directions
    disputed_bytes: int = 0  # edge: wire bytes of a receipt that this edge's own count contradicts
    attempts: int = 1
    time_unix_s: float = 0.0
    purpose: Purpose = ""
    waited_s: float | None = None  # edge: stood waiting for the reply; None: all the time it took

    @property
    def blocked_s(self) -> float:
        """Seconds for which the edge did nothing but this step: coding, and waiting for the reply."""
        return self.codec_s + self.waited_share * self._reply_s

    @property
    def waited_share(self) -> float:
        """Part of the reply's time, 0 to 1, in which the edge stood waiting; the rest hid behind its work."""
        if self.waited_s is None:
            return 1.0
        return min(self.waited_s / self._reply_s, 1.0) if self._reply_s > 0 else 0.0

    @property
    def _reply_s(self) -> float:
        return self.seal_s + self.network_s + self.cloud_queue_s + self.cloud_compute_s

    def to_json(self) -> dict[str, Any]:
        """Flat mapping for one JSON line."""
        flat = asdict(self)
        return {"row": "step", **flat.pop("bytes"), **flat}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Self:
        """Inverse of `to_json`; unknown keys are refused by the constructor."""
        rest = {k: v for k, v in line.items() if k != "row"}
        byte_names = {f.name for f in fields(StepBytes)}
        return cls(
            bytes=StepBytes(**{k: rest.pop(k) for k in list(rest) if k in byte_names}),
            **rest,
        )
