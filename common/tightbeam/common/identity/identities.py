"""Who is who: the identity of this side, and whom it trusts.

An identity is a folder. `tls.crt` and `tls.key` (ECDSA P-256, since gRPC knows no Ed25519 certificates)
secure the connection; `identity.crt` and `identity.key` (Ed25519) sign the handshake, end to end. Something
that ends TLS on the way holds a key of the first kind at best: it can neither read a tensor nor pass for
anyone.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from tightbeam.common.errors import IdentityError
from tightbeam.common.identity.authority import CLOUD_NAMES, InitReport, init_certificates
from tightbeam.common.identity.certificates import (
    CLOCK_SKEW,
    MAKE_ONE,
    Role,
    holder_uri,
    parse_certificate,
    require_ed25519,
    require_holder,
    require_issuer,
    require_tenant_name,
    require_valid,
    role_named,
)

__all__ = [
    "CLOUD_NAMES",
    "Identity",
    "InitReport",
    "Peer",
    "Role",
    "TlsMaterial",
    "Trust",
    "ephemeral_identity",
    "init_certificates",
    "load_identity",
]


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """PEM bytes as `grpc.ssl_channel_credentials` and `grpc.ssl_server_credentials` take them."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Peer:
    """A verified holder: `name` is "cloud" or the tenant's, after "insecure/" if nobody vouches for it."""

    name: str
    public_key: Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose certificates count: those of one certificate authority, or (loopback only) anybody's."""

    authority: x509.Certificate | None

    @classmethod
    def ca(cls, certificate: x509.Certificate) -> Self:
        """Trust what this authority issued."""
        return cls(certificate)

    @classmethod
    def anyone(cls) -> Self:
        """Trust any certificate, and say so: the peer's name begins with "insecure/"."""
        return cls(None)

    def verify(self, certificate_der: bytes, role: Role, now: datetime | None = None) -> Peer:
        """Check the identity certificate of a peer in `role`; raises IdentityError."""
        whose = f"the {role}'s identity certificate"
        certificate = parse_certificate(certificate_der)
        if self.authority is not None:
            require_issuer(certificate, self.authority, whose)
        require_valid(certificate, now or datetime.now(UTC), whose)
        name = require_holder(certificate, role, whose)
        return Peer(name if self.authority else f"insecure/{name}", require_ed25519(certificate, whose))


@dataclass(frozen=True, slots=True)
class Identity:
    """One side's own identity. `authority` and `tls` are None for an ephemeral one."""

    name: str  # the tenant's name, or "cloud"
    role: Role
    signing_key: Ed25519PrivateKey = field(repr=False)
    certificate_der: bytes = field(repr=False)
    authority: x509.Certificate | None = field(default=None, repr=False)
    tls: TlsMaterial | None = field(default=None, repr=False)

    @property
    def trust(self) -> Trust:
        """Whom a holder of this identity trusts: what its authority issued; anyone if it has none."""
        return Trust(self.authority)


def ephemeral_identity(name: str, role: Role = Role.TENANT) -> Identity:
    """Make an identity that nobody vouches for and that lives in memory only, for `--insecure`."""
    if role is Role.TENANT:
        require_tenant_name(name)
    key, now = Ed25519PrivateKey.generate(), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tightbeam insecure identity")])
    uri = x509.UniformResourceIdentifier(holder_uri(name, role))
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=365))
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .sign(key, None)
    )
    return Identity(name, role, key, certificate.public_bytes(Encoding.DER))


def load_identity(folder: Path, now: datetime | None = None) -> Identity:
    """Read and check a folder that `init_certificates` made; raises IdentityError."""
    if not folder.is_dir():
        raise IdentityError(f"There is no identity folder {folder}.", cure=MAKE_ONE)
    now = now or datetime.now(UTC)
    ca_pem = _read(folder / "ca.crt")
    authority = parse_certificate(ca_pem, folder / "ca.crt")
    require_valid(authority, now, str(folder / "ca.crt"))
    own = _load_pair(folder, "identity", authority, now)
    tls = _load_pair(folder, "tls", authority, now)
    if not isinstance(own.key, Ed25519PrivateKey) or not isinstance(tls.key, ec.EllipticCurvePrivateKey):
        raise IdentityError(
            f"The keys in {folder} are of the wrong kind.",
            cure="identity.key must be Ed25519 and tls.key ECDSA; `tightbeam certs init` makes both.",
        )
    role = role_named(own.certificate)
    name = require_holder(own.certificate, role, str(folder / "identity.crt"))
    if require_holder(tls.certificate, role, str(folder / "tls.crt")) != name:
        raise IdentityError(f"tls.crt and identity.crt in {folder} name different holders.", cure=MAKE_ONE)
    material = TlsMaterial(ca_pem, tls.certificate.public_bytes(Encoding.PEM), tls.key_pem)
    return Identity(name, role, own.key, own.certificate.public_bytes(Encoding.DER), authority, material)


@dataclass(frozen=True, slots=True)
class _Pair:
    certificate: x509.Certificate
    key: object
    key_pem: bytes = field(repr=False)


def _load_pair(folder: Path, stem: str, authority: x509.Certificate, now: datetime) -> _Pair:
    path, key_path = folder / f"{stem}.crt", folder / f"{stem}.key"
    certificate, key_pem = parse_certificate(_read(path), path), _read(key_path)
    try:
        key = load_pem_private_key(key_pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{key_path} is not an unencrypted PEM private key.", cure=MAKE_ONE) from error
    if key.public_key() != certificate.public_key():
        raise IdentityError(
            f"{key_path} does not belong to {path}.", cure="Restore both from one backup, or make both anew."
        )
    require_issuer(certificate, authority, str(path))
    require_valid(certificate, now, str(path))
    return _Pair(certificate, key, key_pem)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(f"Cannot read {path}: {error.strerror}.", cure=MAKE_ONE) from error
