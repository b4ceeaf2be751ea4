"""A client's line to the cloud made as slow as its network profile says, for real: a relay on loopback.

Virtual time needs no slow line, it is computed from counted bytes. This is what that model can be held
against: bytes of both directions wait for their turn on a line of the profile's bandwidth, and for half a
round trip each. It needs no root and no Linux, unlike a queueing discipline of the kernel. Loss is not played
packet by packet: it caps the rate as in the model, so that part of the model is not put to the test.

All connections through one relay share the line, as those of one client do. To open a connection costs
nothing; everything that is said over it does, TLS included.
"""

import contextlib
import queue
import socket
import threading
import time
from types import TracebackType
from typing import Self

from tightbeam.common.addresses import is_loopback
from tightbeam.common.errors import UsageError
from tightbeam.federation.profiles import NetworkProfile

__all__ = ["ShapedLine", "require_local"]

_PIECE_BYTES = 16 << 10  # what is sent at once; at 1 Mbit/s it takes an eighth of a second
_AHEAD_S = 0.05  # how long a queue may stand before the line: beyond it the sender has to wait


def require_local(address: str) -> None:
    """Refuse to shape the way to a cloud elsewhere: its certificate names another host than the relay's.

    Raises:
        UsageError: `address` is not on this machine.

    """
    if not is_loopback(address):
        raise UsageError(
            f"--shape goes with a cloud on this machine; {address} is elsewhere, over a line of its own.",
            cure="Leave --shape out, or let the simulation start its cloud.",
        )


class _Direction:
    """One way of the line: when bytes may leave, and when they arrive."""

    def __init__(self, bytes_per_s: float, delay_s: float) -> None:
        self._bytes_per_s, self._delay_s = bytes_per_s, delay_s
        self._free_s, self._lock = 0.0, threading.Lock()

    def arrival(self, num_bytes: int) -> float:
        """Take the line for so many bytes; the `time.monotonic` at which they are at the other end."""
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic()) + num_bytes / self._bytes_per_s
            return self._free_s + self._delay_s

    def wait_for_room(self) -> None:
        """Return when the queue before the line is short."""
        time.sleep(max(self._free_s - time.monotonic() - _AHEAD_S, 0.0))


class ShapedLine:
    """Relays to `target` ("host:port" on this machine); clients connect to `address` instead."""

    def __init__(self, target: str, network: NetworkProfile) -> None:
        host, _, port = target.rpartition(":")
        self._target = host.strip("[]"), int(port)
        delay_s = network.rtt_ms / 2e3
        self._up = _Direction(network.up_bytes_per_s, delay_s)
        self._down = _Direction(network.down_bytes_per_s, delay_s)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._spawn(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and cut every connection; what is under way is lost."""
        with self._lock:
            sockets, threads = [self._listener, *self._sockets], list(self._threads)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in threads:
            thread.join(timeout=5)

    def _spawn(self, target: object, *args: object) -> None:
        assert callable(target)
        thread = threading.Thread(target=target, args=args, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()  # as a cloud that is not there
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [client, server]
            for source, sink, way in ((client, server, self._up), (server, client, self._down)):
                under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                self._spawn(self._take, source, way, under_way)
                self._spawn(self._deliver, sink, under_way)

    @staticmethod
    def _take(
        source: socket.socket, way: _Direction, under_way: "queue.SimpleQueue[tuple[float, bytes]]"
    ) -> None:
        data = b" "
        while data:
            way.wait_for_room()
            try:
                data = source.recv(_PIECE_BYTES)
            except OSError:
                data = b""
            under_way.put((way.arrival(len(data)), data))

    @staticmethod
    def _deliver(sink: socket.socket, under_way: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
        """Hand over what has arrived; an empty piece is the end of what this side says."""
        with contextlib.suppress(OSError):
            while True:
                arrival_s, data = under_way.get()
                time.sleep(max(arrival_s - time.monotonic(), 0.0))
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
