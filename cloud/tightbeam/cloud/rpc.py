"""What the RPC methods share: how an error ends a call, and who is calling."""

from collections.abc import Iterable
from typing import Any, NoReturn

import grpc

from tightbeam.common.errors import IdentityError, TightbeamError
from tightbeam.common.wire.status import status_details
from tightbeam.common.wire.stepping import TENANT_KEY

__all__ = ["Context", "abort", "caller", "require_same_tenant", "tls_tenant"]

Context = grpc.aio.ServicerContext[Any, Any]
_PREFIX = b"tightbeam://tenant/"


async def abort(context: Context, error: TightbeamError) -> NoReturn:
    """End the call with the error's code, message and cure in its status."""
    await context.abort(grpc.StatusCode[error.status], status_details(error))
    raise AssertionError("abort() does not return") from error


def tls_tenant(context: Context) -> str | None:
    """The tenant whom the TLS client certificate names; None when none is visible.

    None is visible when something between edge and cloud ends it. Raises IdentityError for a
    certificate that names no tenant.
    """
    names: Iterable[bytes] = context.auth_context().get("x509_subject_alternative_name", [])
    found = [name.removeprefix(_PREFIX).decode() for name in names if name.startswith(_PREFIX)]
    if not found and "x509_pem_cert" in context.auth_context():
        raise IdentityError(
            "The client certificate names no tenant.", cure="Make one with `tightbeam certs init`."
        )
    return found[0] if found else None


def require_same_tenant(context: Context, peer: str) -> None:
    """Refuse a session of `peer` inside the TLS connection of another tenant."""
    tenant = tls_tenant(context)
    if tenant is not None and tenant != peer:
        raise IdentityError(
            f"TLS names the tenant {tenant!r}, the handshake {peer!r}.",
            cure="Use tls.crt and identity.crt of one folder of `tightbeam certs init`.",
        )


def caller(context: Context, *, tls: bool) -> str:
    """The tenant of a unary call; without TLS, who the caller says it is."""
    if not tls:
        metadata = dict(context.invocation_metadata() or ())
        return f"insecure/{metadata.get(TENANT_KEY)!s}"
    tenant = tls_tenant(context)
    if tenant is None:
        raise IdentityError(
            "No client certificate came with this call.",
            cure="Connect with --identity; behind a proxy that ends TLS, ask the cloud directly.",
        )
    return tenant
