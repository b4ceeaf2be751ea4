"""A TCP path that goes dead without a word: connections stay open and nothing passes any more."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

__all__ = ["HangingProxy"]


class HangingProxy:
    """Forwards to `target_port` on 127.0.0.1; after `hang()` only connections made later work."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._sockets: list[socket.socket] = []
        self._alive = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    def hang(self) -> None:
        """Pass nothing on any more on the connections that there are."""
        self._alive.set()
        self._alive = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target_port))
                self._sockets += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, sink, self._alive), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, hung: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not hung.is_set():
                    sink.sendall(data)
            if not hung.is_set():
                sink.shutdown(socket.SHUT_WR)
