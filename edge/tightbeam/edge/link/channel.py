"""The seam "send one step, get its reply", and its gRPC side: one sealed stream.

In-process, gRPC and fault-injecting channels share `Channel`, so the whole edge runs in tests without a
network.
"""

import math
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from torch import Tensor

from tightbeam.common.accounts.framing import wire_bytes
from tightbeam.common.accounts.rows import StepBytes
from tightbeam.common.backbone import tap_name
from tightbeam.common.errors import (
    CloudBusyError,
    CloudUnavailableError,
    IdentityError,
    IntegrityError,
    ProtocolError,
    TightbeamError,
    printable,
)
from tightbeam.common.wire.handshake import Session
from tightbeam.common.wire.lines import PATIENCE_S
from tightbeam.common.wire.messages import Message, MessageReader, seal_message
from tightbeam.common.wire.status import error_from_details
from tightbeam.common.wire.stepping import SESSION_KEY, billed_records
from tightbeam.proto.backbone_pb2 import BACKWARD, StepReply, StepRequest

__all__ = ["Channel", "Exchange", "GrpcChannel", "error_from_rpc"]

STEPS_METHOD = "/tightbeam.v1.Backbone/Steps"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its reply, measured."""

    reply: Message[StepReply]
    moved: StepBytes  # what counts
    wall_s: float
    seal_s: float
    resent_bytes: int = 0  # wire bytes of inputs that crossed before, with the forward


class Channel(Protocol):
    """Send one step, get its reply. Several may be in flight."""

    def submit(self, header: StepRequest, payloads: list[Tensor]) -> Future[Exchange]:
        """Send a request; the future gives the exchange, or the `TightbeamError` that ended it."""
        ...

    def close(self) -> None:
        """End the stream; pending requests fail."""
        ...


@dataclass(slots=True)
class _Pending:
    header: StepRequest
    future: Future[Exchange]
    started_s: float
    sealed_sizes: list[int]
    payload_bytes: int
    seal_s: float


class GrpcChannel:
    """One `Steps` stream. It does not reconnect: the first failure fails everything pending.

    `silence_s` is how long a cloud that is there (gRPC's pings see to that) may take for a reply.
    """

    def __init__(
        self, grpc_channel: grpc.Channel, session: Session, *, tls: bool, silence_s: float = 600.0
    ) -> None:
        self._session, self._tls, self._silence_s = session, tls, silence_s
        self._last_record_s = time.monotonic()
        self._closed = threading.Event()
        self.abandoned = False  # nobody can use it any more; a mark only, for whoever collects garbage
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._pending: dict[tuple[int, int], _Pending] = {}
        self._lock = threading.Lock()  # records are sealed in the order they are sent
        self._failure: TightbeamError | None = None
        self._reader = MessageReader(session.opener, StepReply, self._admit)
        stream: Any = grpc_channel.stream_stream(STEPS_METHOD)
        self._call: Any = stream(self._outgoing(), metadata=((SESSION_KEY, session.session_id.hex()),))
        self._threads = [
            threading.Thread(target=target, name=f"tightbeam{target.__name__}", daemon=True)
            for target in (self._receive, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, header: StepRequest, payloads: list[Tensor]) -> Future[Exchange]:
        """Seal and send a request."""
        future: Future[Exchange] = Future()
        started_s = time.perf_counter()
        with self._lock:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            counted = payloads[:1] if header.kind == BACKWARD else payloads
            pending = _Pending(header, future, started_s, [], sum(p.numel() for p in counted), 0.0)
            self._last_record_s = time.monotonic()
            self._pending[header.step, header.kind] = pending
            for record in _timed(
                seal_message(header.SerializeToString(), payloads, self._session.sealer), pending
            ):
                pending.sealed_sizes.append(len(record))
                self._outbox.put(record)
        return future

    def close(self) -> None:
        """End the stream."""
        self._end()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def _end(self) -> None:
        self._fail(CloudUnavailableError("This connection was closed."))
        self._outbox.put(None)
        self._call.cancel()

    def _outgoing(self) -> Iterator[bytes]:
        for record in iter(self._outbox.get, None):
            self._last_record_s = time.monotonic()
            yield record

    def _watch(self) -> None:
        """A record that was dropped on the way leaves both ends waiting, and the connection well."""
        while not self._closed.wait(0.5):
            if self.abandoned:
                self._end()
                break
            limit_s = self._silence_s if self._reader.idle else min(self._silence_s, PATIENCE_S)
            if self._pending and time.monotonic() - self._last_record_s > limit_s:
                self._fail(CloudUnavailableError(f"The cloud has sent nothing for {limit_s:.0f} s."))
                self._call.cancel()

    def _receive(self) -> None:
        try:
            for record in self._call:
                self._last_record_s = time.monotonic()
                message = self._reader.feed(record)
                if message is not None:
                    self._deliver(message)
        except grpc.RpcError as error:
            self._fail(error_from_rpc(error))
        except TightbeamError as error:
            self._fail(error)
            self._call.cancel()
        finally:
            self._fail(CloudUnavailableError("The cloud closed the stream."))

    def _admit(self, header: StepReply) -> None:
        """A reply must answer a pending request with a tensor of its shape and its taps, or a failure."""
        pending = self._pending.get((header.step, header.kind))
        if pending is None:
            raise ProtocolError(f"The cloud answered step {header.step}, which nobody asked.")
        if not all(0 <= seconds < math.inf for seconds in (header.queue_s, header.compute_s)):
            raise ProtocolError(f"The cloud answered step {header.step} with {header.compute_s} seconds.")
        shapes = [list(spec.shape) for spec in header.tensors]
        taps = [spec.name for spec in header.tensors[1:]]
        num_tokens, width = pending.header.tensors[0].shape
        # how wide a tap is, the stepper knows; here it must not be wider than the hidden states
        fits = all(len(shape) == 2 and shape[0] == num_tokens and shape[1] <= width for shape in shapes[1:])
        if header.HasField("failure"):
            answers = not shapes
        else:
            answers = shapes[:1] == [[num_tokens, width]] and fits
            answers &= taps == [tap_name(block) for block in pending.header.taps]
        if not answers:
            raise ProtocolError(f"The cloud answered step {header.step} with tensors of shape {shapes}.")

    def _deliver(self, message: Message[StepReply]) -> None:
        with self._lock:
            pending = self._pending.pop((message.header.step, message.header.kind), None)
        if pending is None:
            return  # closed meanwhile: its future has failed
        up = billed_records(pending.header, pending.sealed_sizes)
        resent_bytes = wire_bytes(pending.sealed_sizes[len(up) :], tls=self._tls)
        moved = StepBytes(
            payload_up_bytes=pending.payload_bytes,
            payload_down_bytes=message.payload_bytes,
            sealed_up_bytes=sum(up),
            sealed_down_bytes=sum(message.sealed_sizes),
            wire_up_bytes=wire_bytes(up, tls=self._tls),
            wire_down_bytes=wire_bytes(message.sealed_sizes, tls=self._tls),
        )
        wall_s = time.perf_counter() - pending.started_s
        seal_s = pending.seal_s + message.seal_s
        pending.future.set_result(Exchange(message, moved, wall_s, seal_s, resent_bytes))

    def _fail(self, error: TightbeamError) -> None:
        with self._lock:
            self._failure = self._failure or error
            pending, self._pending = list(self._pending.values()), {}
        self._closed.set()
        for entry in pending:
            entry.future.set_exception(error)


def error_from_rpc(error: grpc.RpcError) -> TightbeamError:
    """The `TightbeamError` that a gRPC failure means."""
    code, details = error.code(), error.details() or ""
    if (ours := error_from_details(details)) is not None:
        return ours
    details = printable(details)
    if "Hostname Verification" in details:
        return IdentityError(
            "The cloud's certificate is not for the host name in its address.",
            cure="Use a name that is in it; or delete the folder `cloud`, run `tightbeam certs init` again "
            "with --host NAME, and restart the cloud.",
        )
    if any(
        mark in details
        for mark in ("CERTIFICATE", "SSL_ERROR", "certificate", "WRONG_VERSION", "Ssl handshake")
    ):
        return IdentityError(
            f"TLS with the cloud failed: {details}",
            cure="Use an identity made by the cloud's own `tightbeam certs init`, and its true address.",
        )
    if code == grpc.StatusCode.DATA_LOSS:
        return IntegrityError(
            "The cloud received a record that does not authenticate.", cure="Connect again."
        )
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return CloudBusyError(f"The cloud is over a limit: {details}", cure="Retry later.")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
        return CloudUnavailableError(
            f"The cloud does not answer ({details or code.name}).",
            cure="Check that `tightbeam serve` runs there; `tightbeam doctor HOST:PORT` says more.",
        )
    return ProtocolError(
        f"The cloud answered {code.name}: {details}", cure="Check that both sides run tightbeam."
    )


def _timed(records: Iterator[bytes], pending: _Pending) -> Iterator[bytes]:
    while True:
        started_s = time.perf_counter()
        record = next(records, None)
        pending.seal_s += time.perf_counter() - started_s
        if record is None:
            return
        yield record
