"""A TCP proxy on loopback that counts what passes, the judge of every analytic byte figure."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

__all__ = ["CountingProxy"]


class CountingProxy:
    """Forwards connections to `target_port` on 127.0.0.1 and counts bytes up (to the target) and down."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._passing = threading.Event()
        self._passing.set()
        self.up_bytes = 0
        self.down_bytes = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._spawn(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def snapshot(self) -> tuple[int, int]:
        """`(up_bytes, down_bytes)` so far."""
        with self._lock:
            return self.up_bytes, self.down_bytes

    def stall(self, seconds: float) -> None:
        """Take nothing more for so long; connections stay open."""
        self._passing.clear()
        threading.Timer(seconds, self._passing.set).start()

    def cut(self) -> None:
        """Reset every connection; new ones are served."""
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening and cut every connection."""
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
                server = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:
                client.close()
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [client, server]
            self._spawn(self._pump, client, server, "up_bytes")
            self._spawn(self._pump, server, client, "down_bytes")

    def _pump(self, source: socket.socket, sink: socket.socket, counter: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                with self._lock:
                    setattr(self, counter, getattr(self, counter) + len(data))
                sink.sendall(data)
                self._passing.wait()
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
