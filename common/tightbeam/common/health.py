"""Whether a cloud serves, by gRPC's own health service: a check for containers that loads gRPC alone.

    python -m tightbeam.common.health localhost:50051 --identity /identity

Any identity of the cloud's authority will do, its own too. A cloud that cannot bill does not serve.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc

__all__ = ["SERVICE", "main", "serves"]

SERVICE = "tightbeam.v1.Backbone"
# grpc.health.v1 as bytes, because loading protobuf takes as long as the rest: field 1 is the service's name,
# and in the answer the status.
_CHECK, _REQUEST, _SERVING = "/grpc.health.v1.Health/Check", b"\n%c%s", b"\x08\x01"
_STATUS = {b"": "UNKNOWN", _SERVING: "SERVING", b"\x08\x02": "NOT_SERVING", b"\x08\x03": "SERVICE_UNKNOWN"}


def serves(address: str, identity: Path | None, timeout_s: float = 5.0) -> str:
    """What the cloud says of itself; anything but SERVING is a reason to send no steps."""
    name = SERVICE.encode()
    with _channel(address, identity) as channel:
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_CHECK)
        try:
            answer = check(_REQUEST % (len(name), name), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return _STATUS.get(answer, "an answer that is none")


def _channel(address: str, identity: Path | None) -> grpc.Channel:
    if identity is None:
        return grpc.insecure_channel(address)
    ca, key, certificate = ((identity / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the cloud says; exit code 1 unless it serves."""
    parser = argparse.ArgumentParser(description="Ask a cloud's health service whether it serves.")
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--identity", type=Path, metavar="DIR", help="none: a cloud without TLS, on loopback")
    chosen = parser.parse_args(arguments)
    try:
        said = serves(chosen.address, chosen.identity)
    except OSError as error:
        said = f"no identity: {error}"
    print(said)
    sys.exit(said != _STATUS[_SERVING])


if __name__ == "__main__":
    main()
