"""One worker thread owns the device and runs steps of the trunk, one after the other; tenants take turns.

Forward and backward are functions of frozen weights and the request, so one can run again after a loss: with
the same bits on a CPU, within rounding on a GPU. Adapters live at the edge: all tenants share what is here.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tightbeam.cloud.retention import Kept, Retention, StepKey
from tightbeam.cloud.turns import TurnPool
from tightbeam.common.accounts.flops import TrunkFlops
from tightbeam.common.backbone import PackedTrunk, Projection, Segments, Taps
from tightbeam.common.errors import CloudBusyError, NonFiniteError, ProtocolError, UnknownStepError

__all__ = ["Done", "Engine"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done:
    """The result of one step, on the CPU, and what it took."""

    tensor_ND: Tensor
    flops: int
    queue_s: float
    compute_s: float
    retention: Literal["hold", "recompute"]
    taps: dict[int, Tensor] = field(default_factory=dict)  # block -> [N, size]
    inputs_sha256: bytes = b""  # of a backward: of the inputs that it went through, as they crossed


class Engine:
    """Runs forwards and backwards of spans of the trunk.

    `projections` are those that taps may go through, by SHA-256.
    """

    def __init__(
        self,
        trunk: PackedTrunk,
        retention: Retention,
        dtype: torch.dtype,
        projections: Mapping[str, Projection] | None = None,
    ) -> None:
        self._trunk = trunk
        self._retention = retention
        self._dtype = dtype
        self._device = trunk.device()
        self._projections = {name: p.to(self._device) for name, p in (projections or {}).items()}
        self._worker = TurnPool(1, "device")
        self._flops: dict[range, TrunkFlops] = {}

    async def forward(
        self,
        key: StepKey,
        hidden_ND: Tensor,
        segments: Segments,
        span: range,
        *,
        keep: bool,
        sha256: bytes = b"",
    ) -> Done:
        """Hidden states after the span, `[N, D]`; with `keep`, a backward will follow.

        `sha256` is of `hidden_ND` as it crossed.

        Raises `NonFiniteError` for NaN or Inf in `hidden_ND`.
        """
        return await self._queue(
            key.tenant, lambda: self._forward(key, hidden_ND, segments, span, keep, sha256)
        )

    async def forward_tapped(
        self, tenant: str, hidden_ND: Tensor, segments: Segments, span: range, taps: Taps
    ) -> Done:
        """As `forward` without `keep`, and the taps beside it; `taps` were admitted."""
        tapped: dict[int, Tensor] = {}

        def work() -> tuple[Tensor, int, Literal["hold", "recompute"]]:
            out_ND, flops = self._forward_tapped(hidden_ND, segments, span, taps, tapped)
            return out_ND, flops, "recompute"

        return replace(await self._queue(tenant, work), taps=tapped)

    async def backward(
        self,
        key: StepKey,
        grad_ND: Tensor,
        hidden_ND: Tensor | None,
        segments: Segments,
        span: range,
        *,
        sha256: bytes = b"",
    ) -> Done:
        """The gradient of the span's input, `[N, D]`, from that of its output.

        `sha256` is of `hidden_ND` as it crossed. Raises `UnknownStepError` when the step is not kept and no
        `hidden_ND` came along.
        """
        used: list[bytes] = []
        done = await self._queue(
            key.tenant, lambda: self._backward(key, grad_ND, hidden_ND, segments, span, sha256, used)
        )
        return replace(done, inputs_sha256=used[0])

    def forget_session(self, tenant: str, session: str) -> None:
        """Free what a session that ended has left; returns at once."""
        self._worker.submit(tenant, lambda: self._retention.discard_session(tenant, session))

    def close(self) -> None:
        """Finish the running step and forget what is kept."""
        self._worker.close()
        self._retention.clear()

    async def _queue(
        self, tenant: str, work: Callable[[], tuple[Tensor, int, Literal["hold", "recompute"]]]
    ) -> Done:
        arrived_s = time.perf_counter()

        def run() -> Done:
            started_s = time.perf_counter()
            try:
                tensor_ND, flops, retention = work()
                tensor_ND = tensor_ND.cpu()  # waits for the device
            except torch.OutOfMemoryError as error:
                self._retention.clear()
                raise CloudBusyError(
                    "The cloud's device ran out of memory on this step.",
                    cure="Use a smaller batch or retry later.",
                ) from error
            done_s = time.perf_counter()
            return Done(tensor_ND, flops, started_s - arrived_s, done_s - started_s, retention)

        return await self._worker.run(tenant, run)

    def _forward(
        self, key: StepKey, hidden_ND: Tensor, segments: Segments, span: range, keep: bool, sha256: bytes
    ) -> tuple[Tensor, int, Literal["hold", "recompute"]]:
        hidden_ND = self._admit(hidden_ND, "activations")
        hold = keep and self._retention.can_hold(key.tenant, segments, span)
        with torch.set_grad_enabled(hold):
            out_ND = self._trunk.run(hidden_ND.requires_grad_(hold), segments, span)
        if keep:
            self._retention.put(key, Kept(hidden_ND, out_ND if hold else None, segments, span, sha256))
        flops = self._count(span).forward(segments.lengths)
        return out_ND.detach(), flops, "hold" if hold else "recompute"

    @torch.no_grad()
    def _forward_tapped(
        self, hidden_ND: Tensor, segments: Segments, span: range, taps: Taps, tapped: dict[int, Tensor]
    ) -> tuple[Tensor, int]:
        hidden_ND = self._admit(hidden_ND, "activations")
        out_ND, inner = self._trunk.run_tapped(hidden_ND, segments, span, taps.blocks)
        flops = self._count(span).forward(segments.lengths)
        if taps.projection:
            project = self._projections[taps.projection]
            inner = {block: project(block, tap_ND) for block, tap_ND in inner.items()}
            flops += 2 * len(hidden_ND) * self._trunk.hidden_size * taps.size * len(inner)
        tapped.update({block: tap_NP.cpu() for block, tap_NP in inner.items()})
        return out_ND, flops

    def _backward(
        self,
        key: StepKey,
        grad_ND: Tensor,
        hidden_ND: Tensor | None,
        segments: Segments,
        span: range,
        sha256: bytes,
        used: list[bytes],
    ) -> tuple[Tensor, int, Literal["hold", "recompute"]]:
        grad_ND = self._admit(grad_ND, "gradients")
        kept = self._retention.take(key)
        if kept is None:
            if hidden_ND is None:
                raise UnknownStepError(
                    f"Step {key.step} of run {key.run!r} is not held here.", cure="Send its inputs."
                )
            hidden_ND = self._admit(hidden_ND, "activations")
            kept = Kept(hidden_ND, None, segments, span, sha256)
        elif kept.span != span or kept.segments.lengths != segments.lengths:
            raise ProtocolError("A backward has other segments or another cut than its forward.")
        used.append(kept.inputs_sha256)
        recompute = kept.out_ND is None
        if kept.out_ND is None:
            with torch.enable_grad():
                kept.out_ND = self._trunk.run(kept.hidden_ND.requires_grad_(), segments, span)
        (grad_input_ND,) = torch.autograd.grad(kept.out_ND, kept.hidden_ND, grad_ND)
        flops = self._count(span).backward(segments.lengths)  # what is not held is run again at our cost
        return grad_input_ND, flops, "recompute" if recompute else "hold"

    def _admit(self, tensor_ND: Tensor, what: str) -> Tensor:
        tensor_ND = tensor_ND.to(self._device, self._dtype)
        if not bool(torch.isfinite(tensor_ND).all()):
            raise NonFiniteError(
                f"The {what} of this step hold NaN or Inf.",
                cure="Lower the learning rate or clip gradients; the last checkpoint is untouched.",
            )
        return tensor_ND

    def _count(self, span: range) -> TrunkFlops:
        if span not in self._flops:
            blocks = [self._trunk.blocks[index] for index in span]
            self._flops[span] = TrunkFlops.from_blocks(blocks, self._trunk.config)
        return self._flops[span]
