"""What the RPC methods share: how a request is read, how an error ends a call, and who is calling."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

import grpc
import psutil
from google.protobuf.message import DecodeError, Message

from tightbeam.common.errors import IdentityError, ProtocolError, TightbeamError
from tightbeam.common.wire.status import status_details
from tightbeam.common.wire.stepping import TENANT_KEY

__all__ = ["Context", "abort", "caller", "reading", "require_same_tenant", "tls_tenant"]

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply")

Context = grpc.aio.ServicerContext[Any, Any]
_LAST_WORDS_S = 5.0
_PREFIX = b"tightbeam://tenant/"
_TLS_CURE = (
    "Use one folder of `tightbeam certs init`; a proxy before the cloud must pass TLS through, not end it."
)


async def abort(context: Context, error: TightbeamError) -> NoReturn:
    """End the call with the error's code, message and cure in its status.

    An edge that reads nothing does not take a status either, and gRPC would keep the call and its buffers for
    as long as the connection lasts: so that is cut.
    """
    try:
        async with asyncio.timeout(_LAST_WORDS_S):
            await context.abort(grpc.StatusCode[error.status], status_details(error))
    except TimeoutError:
        await asyncio.to_thread(_hang_up, context.peer())
    except grpc.aio.InternalError:
        pass  # the connection is gone already
    raise asyncio.CancelledError  # for gRPC: nobody is there to be told


def _hang_up(peer: str) -> None:
    """Cut the TCP connection of a peer as gRPC names it, "ipv4:127.0.0.1:1234"."""
    address, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    for found in psutil.Process().net_connections("tcp"):
        if (
            found.raddr
            and found.fd > 0
            and found.raddr.port == int(port)
            and found.raddr.ip.endswith(address.strip("[]"))
        ):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def reading(
    method: Callable[[Request, Context], Awaitable[Reply]], request: type[Request]
) -> Callable[[bytes, Context], Awaitable[Reply]]:
    """The method for raw bytes: what is no such message is refused in one line, not by gRPC's traceback."""

    async def read(raw: bytes, context: Context) -> Reply:
        try:
            message = request.FromString(raw)
        except DecodeError:
            await abort(context, ProtocolError(f"This is no {request.DESCRIPTOR.name}."))
        return await method(message, context)

    return read


def tls_tenant(context: Context) -> str | None:
    """The tenant whom the TLS client certificate names; None without TLS.

    Raises IdentityError for a certificate that names no tenant.
    """
    names: Iterable[bytes] = context.auth_context().get("x509_subject_alternative_name", [])
    found = [name.removeprefix(_PREFIX).decode() for name in names if name.startswith(_PREFIX)]
    if not found and "x509_pem_cert" in context.auth_context():
        raise IdentityError(
            "TLS ends at a certificate that names no tenant.",
            cure=_TLS_CURE,
        )
    return found[0] if found else None


def require_same_tenant(context: Context, peer: str) -> None:
    """Refuse a session of `peer` inside the TLS connection of another tenant."""
    tenant = tls_tenant(context)
    if tenant is not None and tenant != peer:
        raise IdentityError(
            f"TLS names the tenant {tenant!r}, the handshake {peer!r}.",
            cure=_TLS_CURE,
        )


def caller(context: Context, *, tls: bool) -> str:
    """The tenant of a call beside the steps; without TLS, who the caller says it is."""
    if not tls:
        metadata = dict(context.invocation_metadata() or ())
        return f"insecure/{metadata.get(TENANT_KEY)!s}"
    tenant = tls_tenant(context)
    if tenant is None:
        raise IdentityError(
            "No client certificate came with this call.",
            cure="Connect with --identity.",
        )
    return tenant
