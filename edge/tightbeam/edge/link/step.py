"""One step of one kind at the edge: its request until it is answered, and its row in the accounts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tightbeam.common.accounts.framing import wire_bytes
from tightbeam.common.accounts.rows import Purpose, StepBytes, StepRow
from tightbeam.common.backbone import Segments
from tightbeam.common.errors import NonFiniteError
from tightbeam.common.wire.messages import encode_tensor, sealed_sizes
from tightbeam.common.wire.prefixes import RowMap, SharedPrefixes
from tightbeam.common.wire.stepping import KINDS, billed_records
from tightbeam.edge.link.channel import Exchange
from tightbeam.proto.backbone_pb2 import StepKind, StepReply, StepRequest

__all__ = ["Job", "finite", "judged"]

_HEADER_BYTES = 128  # by which two answers to one step may differ: the receipt itself, seconds that are 0


class Job:
    """A request, what it has taken so far, and what it was for."""

    def __init__(
        self,
        kind: StepKind.ValueType,
        step: int,
        segments: Segments,
        *,
        reply_codec: str,
        seed: int,
        keep: bool = False,
        purpose: Purpose = "",
    ) -> None:
        starts, counts = segments.runs()
        self.kind, self.step, self.segments, self.seed = kind, step, segments, seed
        self.purpose: Purpose = purpose
        self.header = StepRequest(
            step=step,
            kind=kind,
            keep=keep,
            reply_codec=reply_codec,
            lengths=segments.lengths,
            run_starts=starts,
            run_lengths=counts,
        )
        self.payloads: list[Tensor] = []
        self.row_map: RowMap | None = None  # None: every row crosses
        self._sent: list[tuple[int, list[int]]] = []  # of each attempt, what counts: payload and sealed sizes
        self.resent_bytes = 0
        self.codec_s = 0.0
        self.waited_s: float | None = None  # of a submitted step; others are waited for from start to end

    @property
    def attempts(self) -> int:
        """How often it was sent, or was to be."""
        return len(self._sent)

    def begin_attempt(self) -> None:
        """Note what is sent now: a receipt of the cloud is held against it."""
        payloads = [payload.numel() for payload in self.payloads]
        sizes = sealed_sizes(self.header.SerializeToString(), payloads)
        self._sent.append((payloads[0], billed_records(self.header, sizes)))

    def leave_out(self, prefixes: SharedPrefixes) -> None:
        """Let rows that sequences share cross once; before any tensor is added."""
        prefixes.write(self.header)
        self.row_map = prefixes.row_map(self.segments.positions_N)

    def add(self, name: str, tensor_ND: Tensor, codec: str) -> None:
        """Code one tensor into the request."""
        with self.coding():
            if self.row_map is not None:
                tensor_ND = self.row_map.pick(tensor_ND)
            spec, payload = encode_tensor(name, tensor_ND, codec, self.seed)
        self.header.tensors.append(spec)
        self.payloads.append(payload)

    @contextmanager
    def coding(self) -> Iterator[None]:
        """Count what is done inside as the codecs' time."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.codec_s += time.perf_counter() - started_s

    def intent(self, run: str) -> dict[str, Any]:
        """The row that is written before the step leaves: whoever is killed now may be billed for it."""
        row = {"row": "sent", "run": run, "step": self.step, "kind": KINDS[self.kind]}
        return row | {"tokens": self.segments.num_tokens, "time_unix_s": time.time()}

    def row(self, run: str, exchange: Exchange) -> StepRow:
        """The accounts of the finished step.

        What an earlier attempt was billed for counts, the rest is re-sent. A receipt that names what this
        edge never sent or got does not replace its own count: it is in dispute.
        """
        reply: StepReply = exchange.reply.header
        billed, resent_bytes = exchange.moved, self.resent_bytes + exchange.resent_bytes
        disputed_bytes = 0
        if reply.HasField("billed_before"):
            receipt = StepBytes(**{field.name: value for field, value in reply.billed_before.ListFields()})
            if self._may_be(receipt, exchange.moved):
                billed = receipt
                resent_bytes += exchange.moved.wire_total_bytes
            else:
                disputed_bytes = receipt.wire_total_bytes
        return StepRow(
            run=run,
            step=self.step,
            kind=KINDS[self.kind],
            tokens=self.segments.num_tokens,
            segments=len(self.segments.lengths),
            shared_tokens=0 if self.row_map is None else self.row_map.num_shared,
            bytes=billed,
            cloud_flops=reply.flops,
            codec_s=self.codec_s,
            seal_s=exchange.seal_s,
            network_s=max(exchange.wall_s - exchange.seal_s - reply.queue_s - reply.compute_s, 0.0),
            cloud_queue_s=reply.queue_s,
            cloud_compute_s=reply.compute_s,
            resent_bytes=resent_bytes,
            disputed_bytes=disputed_bytes,
            attempts=self.attempts,
            time_unix_s=time.time(),
            purpose=self.purpose,
            waited_s=self.waited_s,
        )

    def _may_be(self, receipt: StepBytes, moved: StepBytes) -> bool:
        """Whether an attempt of this step moved what a receipt says; headers of replies differ a little."""
        up = (receipt.payload_up_bytes, receipt.sealed_up_bytes, receipt.wire_up_bytes)
        sent = {
            (payload, sum(sizes), wire_bytes(sizes, tls=tls))
            for payload, sizes in self._sent
            for tls in (False, True)
        }
        same_answer = receipt.payload_down_bytes == moved.payload_down_bytes
        differences = (
            receipt.sealed_down_bytes - moved.sealed_down_bytes,
            receipt.wire_down_bytes - moved.wire_down_bytes,
        )
        return up in sent and same_answer and max(map(abs, differences)) <= _HEADER_BYTES


def finite(tensor_ND: Tensor, what: str) -> Tensor:
    """The tensor; `NonFiniteError` when it holds NaN or Inf."""
    if not bool(tensor_ND.isfinite().all()):
        raise NonFiniteError(
            f"The {what} at the cut hold NaN or Inf; nothing was sent.",
            cure="Lower train.lr, clip gradients, or use float32; the last checkpoint is untouched.",
        )
    return tensor_ND


def judged(tensor_ND: Tensor, step: int) -> Tensor:
    """A tensor that the cloud answered with; `NonFiniteError` when it holds NaN or Inf."""
    if not bool(tensor_ND.isfinite().all()):
        raise NonFiniteError(
            f"The cloud answered step {step} with NaN or Inf; nothing of it was kept.",
            cure="What was sent was finite: tell the cloud's operator. A trunk in float16 may overflow; in "
            "bfloat16 or float32 it does not.",
        )
    return tensor_ND
