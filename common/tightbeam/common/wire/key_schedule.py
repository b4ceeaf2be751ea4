"""From two shared secrets and the transcript of a handshake to the keys of one session.

The transcript is a list of length-prefixed fields in a fixed order, never serialised protobuf, which has no
canonical form: two honest libraries could hash different bytes. Every hash, signature, MAC and key has its
own label, so that none of them can stand in for another. docs/wire.md gives the order of the fields.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from tightbeam.common.wire.records import PROTOCOL, SECRET_BYTES, Aead
from tightbeam.proto.backbone_pb2 import Card, HandshakeReply, HandshakeRequest, KeyBundle

__all__ = [
    "SUITES",
    "SessionSecrets",
    "Transcript",
    "bundle_content",
    "card_digest",
    "confirmation",
    "derive_secrets",
    "digest",
    "fields",
    "key_id_of",
    "suite_name",
]


def suite_name(aead: Aead) -> str:
    """Return the name under which the handshake agrees on a cipher; everything else is fixed."""
    return f"{PROTOCOL} X-Wing HKDF-SHA256 {aead.value}"


SUITES = {suite_name(aead): aead for aead in Aead}


def fields(label: str, *values: bytes) -> bytes:
    """Join a label and values so that no two lists give the same bytes: each has its length before it."""
    parts = (f"{PROTOCOL} {label}".encode(), *values)
    return b"".join(len(part).to_bytes(4) + part for part in parts)


def digest(label: str, *values: bytes) -> bytes:
    """SHA-256 over labelled fields."""
    return hashlib.sha256(fields(label, *values)).digest()


def key_id_of(kem_public_key: bytes) -> bytes:
    """Name a key by its own hash: 16 bytes."""
    return digest("key id", kem_public_key)[:16]


def bundle_content(bundle: KeyBundle) -> bytes:
    """Return what the cloud's identity signs in a key bundle."""
    prices = bundle.prices
    priced = (
        prices.currency.encode(),
        struct.pack(">d", prices.per_gigabyte),
        struct.pack(">d", prices.per_petaflop),
    )
    return fields(
        "bundle",
        bundle.key_id,
        bundle.kem_public_key,
        bundle.not_after.to_bytes(8, signed=True),
        bundle.identity_certificate,
        bundle.fingerprint.encode(),
        *(priced if bundle.HasField("prices") else ()),
        *((bundle.card_digest,) if bundle.card_digest else ()),
    )


def card_digest(card: Card) -> bytes:
    """Return the digest of what an edge takes from a card beside the backbone: number format and files."""
    files = [blob for blob in card.blobs if blob.name.startswith("file/")]
    entries = [(file.name.encode(), file.sha256.encode(), file.num_bytes.to_bytes(8)) for file in files]
    return digest("card", card.dtype.encode(), *(value for entry in entries for value in entry))


@dataclass(frozen=True, slots=True)
class Transcript:
    """What both sides have seen of one handshake; each property is bound to all that came before it."""

    bundle: KeyBundle
    request: HandshakeRequest
    reply: HandshakeReply = field(default_factory=HandshakeReply)

    @property
    def _offer(self) -> tuple[bytes, ...]:
        request = self.request
        return (
            request.suite.encode(),
            hashlib.sha256(bundle_content(self.bundle)).digest(),
            request.key_id,
            request.kem_public_key,
            request.identity_certificate,
            request.cut.encode(),
            request.fingerprint.encode(),
            request.run.encode(),
        )

    @property
    def sealing_to_cloud(self) -> bytes:
        """HPKE info under which the edge's secret is sealed for the cloud."""
        return digest("secret for the cloud", *self._offer)

    @property
    def signed_by_edge(self) -> bytes:
        """What the edge's identity signs: its whole request and the cloud's bundle."""
        return fields("request", *self._offer, self.request.sealed_secret)

    @property
    def _accepted(self) -> tuple[bytes, ...]:
        return (*self._offer, self.request.sealed_secret, self.request.signature, self.reply.session_id)

    @property
    def sealing_to_edge(self) -> bytes:
        """HPKE info under which the cloud's secret is sealed for the edge's ephemeral key."""
        return digest("secret for the edge", *self._accepted)

    @property
    def hash(self) -> bytes:
        """SHA-256 of the whole handshake, from which keys and confirmation derive."""
        return digest("handshake", *self._accepted, self.reply.sealed_secret)


@dataclass(frozen=True, slots=True)
class SessionSecrets:
    """32 bytes each: the traffic secrets of the two directions and the key of the confirmation."""

    edge_to_cloud: bytes = field(repr=False)
    cloud_to_edge: bytes = field(repr=False)
    confirmation: bytes = field(repr=False)


def derive_secrets(edge_secret: bytes, cloud_secret: bytes, transcript_hash: bytes) -> SessionSecrets:
    """HKDF (RFC 5869) of both secrets, salted with the transcript: whoever lacks one of them has nothing."""
    extracted = HKDF.extract(SHA256(), transcript_hash, edge_secret + cloud_secret)

    def expand(label: str) -> bytes:
        return HKDFExpand(SHA256(), SECRET_BYTES, f"{PROTOCOL} {label}".encode()).derive(extracted)

    return SessionSecrets(expand("edge to cloud"), expand("cloud to edge"), expand("confirmation"))


def confirmation(secrets: SessionSecrets, transcript_hash: bytes) -> bytes:
    """HMAC-SHA256 with which the cloud shows that it derived the same secrets."""
    return hmac.digest(secrets.confirmation, transcript_hash, "sha256")
