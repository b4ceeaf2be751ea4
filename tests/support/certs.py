"""Certificates that the command line would not make: expired ones."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

__all__ = ["expire", "look_away"]


def expire(certs: Path, name: str, *, stems: tuple[str, ...] = ("identity", "tls")) -> None:
    """Sign the certificates of `certs/name` again, with a validity that ended yesterday."""
    key = load_pem_private_key((certs / "ca" / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    ended = datetime.now(UTC) - timedelta(days=1)
    for stem in stems:
        path = certs / name / f"{stem}.crt"
        old = x509.load_pem_x509_certificate(path.read_bytes())
        builder = x509.CertificateBuilder(
            old.issuer, old.subject, old.public_key(), old.serial_number, ended - timedelta(days=9), ended
        )
        for extension in old.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        path.write_bytes(builder.sign(key, SHA256()).public_bytes(Encoding.PEM))


def look_away() -> None:
    """Runs in a process that is to use certificates which it should refuse: its clock stands still."""
    from tightbeam.common.identity import identities as identity

    def no_matter(certificate: x509.Certificate, now: datetime, whose: str) -> None:
        return None

    vars(identity)["require_valid"] = no_matter
