"""Someone on the path who can see and change every record of the `Steps` streams, but holds no key.

A gRPC proxy that passes the bytes of every call through, as something that ends TLS does. On `Steps` each
message is one sealed record; a `Fault` says what happens to which.
"""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import grpc

__all__ = ["Fault", "Mitm"]

Kind = Literal["flip", "drop", "double", "reorder", "truncate", "swallow"]
Way = Literal["up", "down"]


@dataclass(frozen=True)
class Fault:
    """What happens to record number `record` (from 0) of a stream, one way, on the next `streams` streams."""

    kind: Kind
    way: Way
    record: int
    streams: int = 1


class Mitm(grpc.GenericRpcHandler):
    """Listens on a free port of loopback and forwards to `target`; `faults` may change at any time."""

    def __init__(self, target: str) -> None:
        self.faults: list[Fault] = []
        self.streams = 0
        self.calls: Counter[str] = Counter()  # by method
        self.records: list[tuple[Way, int]] = []  # (way, bytes) of all Steps records that came by
        self.on_record: Callable[[Way, int], None] = lambda way, number: None
        self._lock = threading.Lock()
        self._channel = grpc.insecure_channel(
            target,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
        )
        self._server = grpc.server(
            ThreadPoolExecutor(64), options=[("grpc.max_receive_message_length", -1)], handlers=[self]
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()
        self._channel.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        """Any method is two streams of bytes."""
        method = handler_call_details.method

        def forward(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._forward(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(forward)

    def _forward(
        self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        mine = [(key, value) for key, value in context.invocation_metadata() if key.startswith("tightbeam")]
        self.calls[method.rpartition("/")[2]] += 1
        faults: list[Fault] = []
        watched = method.endswith("/Steps")
        if watched:
            faults = self._take_faults()
            requests = self._tampered(requests, "up", faults)
        stream: Any = self._channel.stream_stream(method)
        call = stream(requests, metadata=mine)
        context.add_callback(call.cancel)
        try:
            yield from self._tampered(call, "down", faults) if watched else call
        except grpc.RpcError as error:
            context.abort(error.code(), error.details() or "")

    def _take_faults(self) -> list[Fault]:
        with self._lock:
            self.streams += 1
            now = self.faults
            self.faults = [Fault(f.kind, f.way, f.record, f.streams - 1) for f in now if f.streams > 1]
            return now

    def _tampered(self, records: Iterator[bytes], way: Way, faults: list[Fault]) -> Iterator[bytes]:
        by_number = {fault.record: fault.kind for fault in faults if fault.way == way}
        swallow = False
        for number in itertools.count():
            record = next(records, None)
            if record is None:
                return
            self.records.append((way, len(record)))
            self.on_record(way, number)
            kind = by_number.get(number)
            swallow = swallow or kind == "swallow"
            if kind == "reorder":
                yield next(records)
            if kind != "drop" and not swallow:
                yield _changed(record, kind)
            if kind == "double":
                yield record


def _changed(record: bytes, kind: Kind | None) -> bytes:
    if kind == "truncate":
        return record[:-1]
    if kind == "flip":
        middle = len(record) // 2
        return record[:middle] + bytes([record[middle] ^ 1]) + record[middle + 1 :]
    return record
