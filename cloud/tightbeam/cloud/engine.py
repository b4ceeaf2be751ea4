"""One worker thread owns the device and runs steps of the trunk, one after the other.

Forward and backward are functions of frozen weights and the request, so one can run again after a loss: with
the same bits on a CPU, within rounding on a GPU. Adapters live at the edge: all tenants share what is here.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tightbeam.cloud.retention import Kept, Retention, StepKey
from tightbeam.common.backbone import PackedTrunk, Projection, Segments, Taps
from tightbeam.common.costs.flops import TrunkFlops
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
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._flops: dict[range, TrunkFlops] = {}

    async def forward(
        self, key: StepKey, hidden_ND: Tensor, segments: Segments, span: range, *, keep: bool
    ) -> Done:
        """Hidden states after the span, `[N, D]`; with `keep`, a backward will follow.

        Raises `NonFiniteError` for NaN or Inf in `hidden_ND`.
        """
        return await self._queue(lambda: self._forward(key, hidden_ND, segments, span, keep))

    async def forward_tapped(self, hidden_ND: Tensor, segments: Segments, span: range, taps: Taps) -> Done:
        """As `forward` without `keep`, and the taps beside it; `taps` were admitted."""
        tapped: dict[int, Tensor] = {}

        def work() -> tuple[Tensor, int, Literal["hold", "recompute"]]:
            out_ND, flops = self._forward_tapped(hidden_ND, segments, span, taps, tapped)
            return out_ND, flops, "recompute"

        return replace(await self._queue(work), taps=tapped)

    async def backward(
        self, key: StepKey, grad_ND: Tensor, hidden_ND: Tensor | None, segments: Segments, span: range
    ) -> Done:
        """The gradient of the span's input, `[N, D]`, from that of its output.

        Raises `UnknownStepError` when the step is not kept and no `hidden_ND` came along.
        """
        return await self._queue(lambda: self._backward(key, grad_ND, hidden_ND, segments, span))

    def forget_session(self, session: str) -> None:
        """Free what a session that ended has left; returns at once."""
        self._worker.submit(self._retention.discard_session, session)

    def close(self) -> None:
        """Finish the running step and forget what is kept."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._retention.clear()

    async def _queue(self, work: Callable[[], tuple[Tensor, int, Literal["hold", "recompute"]]]) -> Done:
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

        return await asyncio.get_running_loop().run_in_executor(self._worker, run)

    def _forward(
        self, key: StepKey, hidden_ND: Tensor, segments: Segments, span: range, keep: bool
    ) -> tuple[Tensor, int, Literal["hold", "recompute"]]:
        hidden_ND = self._admit(hidden_ND, "activations")
        hold = keep and self._retention.can_hold(segments, span)
        with torch.set_grad_enabled(hold):
            out_ND = self._trunk.run(hidden_ND.requires_grad_(hold), segments, span)
        if keep:
            self._retention.put(key, hidden_ND, out_ND if hold else None, segments, span)
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
        self, key: StepKey, grad_ND: Tensor, hidden_ND: Tensor | None, segments: Segments, span: range
    ) -> tuple[Tensor, int, Literal["hold", "recompute"]]:
        grad_ND = self._admit(grad_ND, "gradients")
        kept = self._retention.take(key)
        if kept is None:
            if hidden_ND is None:
                raise UnknownStepError(
                    f"Step {key[2]} of run {key[1]!r} is not held here.", cure="Send its inputs."
                )
            hidden_ND = self._admit(hidden_ND, "activations")
            kept = Kept(hidden_ND, None, segments, span, 0)
        elif kept.span != span or kept.segments.lengths != segments.lengths:
            raise ProtocolError("A backward has other segments or another cut than its forward.")
        recompute = kept.out_ND is None
        if kept.out_ND is None:
            with torch.enable_grad():
                kept.out_ND = self._trunk.run(kept.hidden_ND.requires_grad_(), segments, span)
        (grad_input_ND,) = torch.autograd.grad(kept.out_ND, kept.hidden_ND, grad_ND)
        flops = self._count(span).backward(segments.lengths, recompute=recompute)
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
