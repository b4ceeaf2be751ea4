"""The rules of our certificates: who they name, who issued them, and when they count.

A holder is named in the one SAN URI, `tightbeam://cloud` or `tightbeam://tenant/<name>`. The authority issues
directly, so a chain is always one signature long. Every check raises IdentityError and says what to do.
"""

import re
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tightbeam.common.errors import IdentityError

__all__ = [
    "CLOCK_SKEW",
    "MAKE_ONE",
    "Role",
    "holder_uri",
    "parse_certificate",
    "require_ed25519",
    "require_holder",
    "require_issuer",
    "require_tenant_name",
    "require_valid",
    "role_named",
]

CLOCK_SKEW = timedelta(minutes=10)  # new certificates are valid from this long ago
MAKE_ONE = "Make one with `tightbeam certs init` and give the folder of this side."
_TENANT = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class Role(StrEnum):
    """What a certificate's holder may be in a handshake."""

    CLOUD = "cloud"
    TENANT = "tenant"


def holder_uri(name: str, role: Role) -> str:
    """Return the SAN URI that names a holder."""
    return "tightbeam://cloud" if role is Role.CLOUD else f"tightbeam://tenant/{name}"


def require_tenant_name(name: str) -> str:
    """Return `name` if it can be a tenant's: it becomes a folder and a part of a URI."""
    if not _TENANT.fullmatch(name) or name in ("ca", "cloud"):
        raise IdentityError(
            f"{name!r} cannot be the name of a client.",
            cure="Use 1 to 63 lower-case letters, digits, - and _, and neither 'ca' nor 'cloud'.",
        )
    return name


def parse_certificate(content: bytes, path: Path | None = None) -> x509.Certificate:
    """Read PEM of one of our files, or DER that a peer sent (no path)."""
    try:
        if path is None:
            return x509.load_der_x509_certificate(content)
        return x509.load_pem_x509_certificate(content)
    except _UNREADABLE as error:
        raise IdentityError(f"{path or 'What the peer sent'} is not a certificate.", cure=MAKE_ONE) from error


def require_issuer(certificate: x509.Certificate, authority: x509.Certificate, whose: str) -> None:
    """Require that `authority` itself signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (*_UNREADABLE, TypeError, InvalidSignature) as error:
        raise IdentityError(
            f"Not issued by this side's certificate authority: {whose}.",
            cure="Give both sides folders of one `tightbeam certs init`, and --insecure on both or neither.",
        ) from error


def require_valid(certificate: x509.Certificate, now: datetime, whose: str) -> None:
    """Require that `now` (aware) lies within the certificate's dates."""
    if now < certificate.not_valid_before_utc:
        raise IdentityError(
            f"Not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: {whose}.",
            cure="Set this machine's clock.",
        )
    if now > certificate.not_valid_after_utc:
        raise IdentityError(
            f"Expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: {whose}.",
            cure="Delete that side's folder, run `tightbeam certs init` again and restart that side.",
        )


def require_holder(certificate: x509.Certificate, role: Role, whose: str) -> str:
    """Return the holder's name, "cloud" or the tenant's, if the certificate names one in `role`."""
    uris = _uris(certificate)
    if role is Role.CLOUD and uris == [holder_uri("cloud", role)]:
        return "cloud"
    prefix = holder_uri("", Role.TENANT)
    if role is Role.TENANT and len(uris) == 1 and uris[0].startswith(prefix):
        return require_tenant_name(uris[0].removeprefix(prefix))
    raise IdentityError(
        f"Does not name a {role}: {whose}.",
        cure="Give the cloud the folder `cloud` and each edge its own folder.",
    )


def role_named(certificate: x509.Certificate) -> Role:
    """Return the role that the certificate claims; `require_holder` checks it."""
    return Role.CLOUD if holder_uri("cloud", Role.CLOUD) in _uris(certificate) else Role.TENANT


def require_ed25519(certificate: x509.Certificate, whose: str) -> Ed25519PublicKey:
    """Return the certificate's key if it can sign a handshake; a TLS certificate cannot."""
    try:
        key = certificate.public_key()
    except _UNREADABLE:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError(f"Holds no Ed25519 key: {whose}.", cure="Use identity.crt here, not tls.crt.")
    return key


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except _UNREADABLE:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)
