"""How long either end waits before it takes the other for dead: as long as the slowest line needs to move.

A ping, like a record, waits behind everything that sockets hold already: send and receive buffers of both
ends and of a proxy between them, up to 15 MB with Linux's defaults. On 1 Mbit/s, the slowest line that is
supported, they take two minutes to empty. Whoever waits less cuts a connection that moves.
"""

from typing import Any

__all__ = ["LIVENESS", "PATIENCE_S"]

PATIENCE_S = 120.0  # for a ping's answer, for the next record of a message, for a small call beside big ones

LIVENESS: list[tuple[str, Any]] = [  # options of a gRPC channel or server
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", int(PATIENCE_S * 1e3)),  # of bytes that TCP does not get across (Linux)
    ("grpc.http2.ping_timeout_ms", int(PATIENCE_S * 1e3)),  # of a peer that TCP reaches, but that is hung
    ("grpc.http2.max_pings_without_data", 0),
]
