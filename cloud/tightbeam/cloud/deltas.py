"""The cloud's end of delta coding: what it remembers of each run's samples, bounded in bytes.

The edge leads: it names every base by its digest, and one that is not held here is asked for, never guessed
(`UnknownBaseError`). So anything may be forgotten at any time: runs that have been quiet for longest go
first, then a run's own oldest samples; a run that stays quiet goes as a whole.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.delta import (
    Base,
    Bases,
    BaseStore,
    Samples,
    checks_of,
    decode_delta,
    encode_delta,
)
from tightbeam.common.wire.delta_header import BASE, DeltaHeader
from tightbeam.common.wire.messages import Message, tensor_spec
from tightbeam.common.wire.stepping import HIDDEN
from tightbeam.proto.backbone_pb2 import StepRequest, TensorSpec

__all__ = ["CloudDeltas", "DeltaForward", "RunKey"]

RunKey = tuple[str, str]
"""Tenant and run: an edge that reconnects finds what its earlier session left."""


@dataclass(frozen=True, slots=True)
class DeltaForward:
    """A delta-coded forward that is being answered."""

    samples: Samples
    hidden_ND: Tensor
    content: Tensor  # uint8: what the step is about, the same however it came
    down: Bases | None  # of the reply; None: coded alone


@dataclass(slots=True)
class _Run:
    up: BaseStore = field(default_factory=BaseStore)
    down: BaseStore = field(default_factory=BaseStore)
    used_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        return self.up.num_bytes + self.down.num_bytes

    def drop_oldest(self) -> int:
        """How many bytes that freed."""
        before = self.num_bytes
        self.up.drop_oldest()
        self.down.drop_oldest()
        return before - self.num_bytes


class CloudDeltas:
    """What is remembered for all runs. Thread-safe; values are decoded and encoded outside the lock."""

    def __init__(
        self,
        max_bytes: int,
        hidden_size: int,
        *,
        idle_s: float = 1800.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes = max_bytes
        self.tenant_bytes = max_bytes // 2
        self.idle_s = idle_s
        self._size, self._clock = hidden_size, clock
        self._lock = threading.Lock()
        self._runs: OrderedDict[RunKey, _Run] = OrderedDict()  # the one used longest ago first

    @property
    def num_bytes(self) -> int:
        """Kept now."""
        with self._lock:
            return sum(run.num_bytes for run in self._runs.values())

    def admit(self, header: StepRequest) -> None:
        """Refuse a request by its header alone: `ProtocolError`."""
        if DeltaHeader.read(header, self._size) is not None and not self.max_bytes:
            raise ProtocolError("This cloud has no memory for delta codecs.", cure="Use a codec without.")

    def receive(self, run: RunKey, message: Message[StepRequest]) -> DeltaForward | None:
        """Decode a forward and remember its samples; None for one that names none.

        Raises:
            UnknownBaseError: A base is not held; nothing was remembered.
            ProtocolError: Bases that came along are not the ones named.
            CodecError: A payload does not decode.
        """
        header = DeltaHeader.read(message.header, self._size)
        if header is None:
            return None
        samples, up = header.samples, None
        brought = _brought(message, header) if message.has(BASE) else None
        with self._lock:
            kept = self._use(run)
            if header.up is not None:
                up = kept.up.find(samples, header.up)
            down = brought
            if down is None and header.down is not None:
                down = kept.down.find(samples, header.down)
        spec, payload = message.coded(HIDDEN)
        if up is None:
            return DeltaForward(samples, message.tensor(HIDDEN), payload, down)
        hidden_ND = decode_delta(spec.codec, payload, up, samples.lengths, self._size)
        with self._lock:
            self._use(run).up.remember(samples, hidden_ND, up)
            self._trim(run)
        return DeltaForward(samples, hidden_ND, hidden_ND.view(torch.uint8).flatten(), down)

    def answer(
        self, run: RunKey, forward: DeltaForward, out_ND: Tensor, codec_name: str
    ) -> tuple[TensorSpec, Tensor]:
        """The reply's tensor, and remember what the edge will decode."""
        down, samples = forward.down, forward.samples
        assert down is not None, "a reply without bases is coded alone"
        payload, decoded_ND = encode_delta(codec_name, out_ND, down, samples.lengths)
        with self._lock:
            self._use(run).down.remember(samples, decoded_ND, down)
            self._trim(run)
        return tensor_spec(HIDDEN, out_ND, codec_name), payload

    def expire(self) -> None:
        """Forget runs that have been quiet for `idle_s`."""
        with self._lock:
            self._expire()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._runs.clear()

    def _use(self, key: RunKey) -> _Run:
        self._expire()
        run = self._runs.setdefault(key, _Run())
        self._runs.move_to_end(key)
        run.used_s = self._clock()
        return run

    def _expire(self) -> None:
        oldest_s = self._clock() - self.idle_s
        while self._runs and next(iter(self._runs.values())).used_s < oldest_s:
            self._runs.popitem(last=False)

    def _trim(self, current: RunKey) -> None:
        """Keep a tenant to its share and all to the bound: the run used longest ago gives first."""
        for keys, limit in (
            ([key for key in self._runs if key[0] == current[0]], self.tenant_bytes),
            (list(self._runs), self.max_bytes),
        ):
            excess = sum(self._runs[key].num_bytes for key in keys) - limit
            for key in keys:
                while excess > 0 and self._runs[key].num_bytes:
                    excess -= self._runs[key].drop_oldest()
        for key in [key for key, run in self._runs.items() if key != current and not run.num_bytes]:
            del self._runs[key]


def _brought(message: Message[StepRequest], header: DeltaHeader) -> Bases:
    """The bases of the reply that came along; they must be what their digests say."""
    assert header.down is not None, "the header was checked"
    rows = message.tensor(BASE).split(header.samples.lengths)
    bases = tuple(Base.of(part) if check else None for part, check in zip(rows, header.down, strict=True))
    if checks_of(bases) != header.down:
        raise ProtocolError("The bases that a request brings along are not the ones that it names.")
    return bases
