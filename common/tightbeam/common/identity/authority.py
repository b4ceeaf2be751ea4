"""The small certificate authority behind `tightbeam certs init`.

    certs/ca/       ca.key (stays with whoever admits clients), ca.crt
    certs/cloud/    ca.crt, tls.crt, tls.key, identity.crt, identity.key
    certs/<client>/ the same five; this folder is all that the client's machine needs

A folder appears whole or not at all (written beside its place, then renamed), and one that is there is never
touched: running it again with more names adds only what is missing. Private keys are unencrypted and readable
by their owner only (0600; on Windows, by whoever may read the user's files).
"""

import ipaddress
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from tightbeam.common.errors import IdentityError
from tightbeam.common.identity.certificates import (
    CLOCK_SKEW,
    Role,
    holder_uri,
    parse_certificate,
    require_tenant_name,
    require_valid,
)

__all__ = ["CLOUD_NAMES", "InitReport", "init_certificates"]

CLOUD_NAMES = ("localhost", "127.0.0.1", "::1")
_CA_LIFETIME = timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class InitReport:
    """Which folders `init_certificates` made and which it found and kept."""

    created: tuple[Path, ...]
    kept: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    leaf_lifetime: timedelta

    def issue(
        self, public_key: ec.EllipticCurvePublicKey | Ed25519PublicKey, names: Sequence[x509.GeneralName]
    ) -> bytes:
        """Return the PEM certificate of a leaf, valid no longer than the authority itself."""
        now = datetime.now(UTC)
        until = min(now + self.leaf_lifetime, self.certificate.not_valid_after_utc)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            x509.CertificateBuilder(self.certificate.subject, _subject(str(names[0].value)))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(own, critical=False)
        )
        return builder.sign(self.key, SHA256()).public_bytes(Encoding.PEM)


def init_certificates(
    folder: Path, *, clients: Sequence[str], cloud_names: Sequence[str] = CLOUD_NAMES, days: int = 365
) -> InitReport:
    """Make what is missing of authority, cloud and client folders under `folder`.

    `cloud_names` are the host names and addresses under which clients reach the cloud. Raises IdentityError
    for a name that cannot be a client's, and for an authority that is incomplete or expired.
    """
    wanted = [require_tenant_name(name) for name in dict.fromkeys(clients)]
    folder.mkdir(parents=True, exist_ok=True)
    created = [folder / "ca"] if not (folder / "ca").exists() else []
    if created:
        _write_folder(folder / "ca", _new_authority())
    authority = _load_authority(folder / "ca", timedelta(days=days))
    if (folder / "cloud").exists():
        _require_hosts(folder / "cloud", [name for name in cloud_names if name not in CLOUD_NAMES])
    holders = [("cloud", Role.CLOUD), *((name, Role.TENANT) for name in wanted)]
    kept = [] if created else [folder / "ca"]
    for name, role in holders:
        if (folder / name).exists():
            kept.append(folder / name)
        else:
            hosts = cloud_names if role is Role.CLOUD else ()
            _write_folder(folder / name, _new_holder(authority, name, role, hosts))
            created.append(folder / name)
    return InitReport(tuple(created), tuple(kept))


def _require_hosts(folder: Path, names: Sequence[str]) -> None:
    """Refuse to keep a cloud's certificate that lacks one of the names asked for: nobody would notice."""
    path = folder / "tls.crt"
    try:
        certificate = parse_certificate(path.read_bytes(), path)
    except OSError as error:
        raise IdentityError(f"Cannot read {path}: {error.strerror}.", cure=f"Delete {folder}.") from error
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    missing = [name for name in names if _host(name) not in found]
    if missing:
        raise IdentityError(
            f"{folder} is there already, and its certificate does not have the host {', '.join(missing)}.",
            cure=f"Delete {folder}, run this again with all hosts, and restart the cloud; edges keep theirs.",
        )


def _new_authority() -> dict[str, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = _subject("tightbeam certificate authority")
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + _CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )
    return {"ca.key": _pem(key), "ca.crt": certificate.public_bytes(Encoding.PEM)}


def _load_authority(folder: Path, leaf_lifetime: timedelta) -> _Authority:
    try:
        content = (folder / "ca.crt").read_bytes()
        key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise IdentityError(
            f"The certificate authority in {folder} is incomplete: {error}.",
            cure="Put ca.crt and ca.key back, or start anew in another folder.",
        ) from error
    certificate = parse_certificate(content, folder / "ca.crt")
    require_valid(certificate, datetime.now(UTC), str(folder / "ca.crt"))
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise IdentityError(
            f"ca.key does not belong to ca.crt in {folder}.", cure="Restore both files from one backup."
        )
    return _Authority(certificate, key, leaf_lifetime)


def _new_holder(authority: _Authority, name: str, role: Role, hosts: Sequence[str]) -> dict[str, bytes]:
    uri = x509.UniformResourceIdentifier(holder_uri(name, role))
    tls_key, signing_key = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
    return {
        "ca.crt": authority.certificate.public_bytes(Encoding.PEM),
        "tls.key": _pem(tls_key),
        "tls.crt": authority.issue(tls_key.public_key(), [uri, *map(_host, hosts)]),
        "identity.key": _pem(signing_key),
        "identity.crt": authority.issue(signing_key.public_key(), [uri]),
    }


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise IdentityError(f"{name!r} is no host name.", cure="Write other alphabets as xn--.") from error


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        staged = Path(temporary) / folder.name
        staged.mkdir(mode=0o700)
        for name, content in files.items():
            mode = 0o600 if name.endswith(".key") else 0o644
            with os.fdopen(os.open(staged / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        staged.rename(folder)
