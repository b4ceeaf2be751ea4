"""A second implementation of docs/wire.md, written from the page, sharing no code with tightbeam.

It plays either end against the real one, and makes and checks the vectors. Slow, and without any checks.
"""

import hashlib
import hmac
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from tightbeam.proto.backbone_pb2 import HandshakeReply, HandshakeRequest, KeyBundle

HPKE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
CIPHERS: dict[str, type[AESGCM] | type[ChaCha20Poly1305]] = {
    "AES-256-GCM": AESGCM,
    "ChaCha20-Poly1305": ChaCha20Poly1305,
}
LABEL = b"tightbeam/1 "
EDGE_TO_CLOUD, CLOUD_TO_EDGE = 1, 2


def mac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


def expand(secret: bytes, label: bytes, length: int = 32) -> bytes:
    """HKDF-Expand of at most one block."""
    return mac(secret, LABEL + label + b"\x01")[:length]


def fields(label: bytes, *values: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(value)) + value for value in (LABEL + label, *values))


def digest(label: bytes, *values: bytes) -> bytes:
    return hashlib.sha256(fields(label, *values)).digest()


@dataclass(frozen=True)
class RecordKeys:
    """Everything that seals record `number`."""

    key: bytes
    iv: bytes
    nonce: bytes
    associated_data: bytes


def record_keys(secret: bytes, session_id: bytes, direction: int, number: int, context: bytes) -> RecordKeys:
    for _ in range(number >> 16):
        secret = expand(secret, b"next")
    key, iv = expand(secret, b"key"), expand(secret, b"iv", 12)
    nonce = bytes(a ^ b for a, b in zip(iv, number.to_bytes(12), strict=True))
    place = bytes([direction]) + struct.pack(">QI", number, len(context))
    return RecordKeys(key, iv, nonce, b"tightbeam/1\0\0\0\0\0" + session_id + place + context)


def seal_record(cipher: str, keys: RecordKeys, plaintext: bytes) -> bytes:
    return CIPHERS[cipher](keys.key).encrypt(keys.nonce, plaintext, keys.associated_data)


def open_record(cipher: str, keys: RecordKeys, record: bytes) -> bytes:
    return CIPHERS[cipher](keys.key).decrypt(keys.nonce, record, keys.associated_data)


@dataclass
class KemPair:
    """An X-Wing key pair of which the private halves can be written down."""

    mlkem: MLKEM768PrivateKey = field(default_factory=MLKEM768PrivateKey.generate)
    x25519: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)

    @property
    def public(self) -> bytes:
        return self.mlkem.public_key().public_bytes_raw() + self.x25519.public_key().public_bytes_raw()

    @classmethod
    def from_private(cls, mlkem_seed: bytes, x25519: bytes) -> "KemPair":
        return cls(
            MLKEM768PrivateKey.from_seed_bytes(mlkem_seed), X25519PrivateKey.from_private_bytes(x25519)
        )

    def open(self, sealed: bytes, info: bytes) -> bytes:
        return HPKE.decrypt(sealed, MLKEM768X25519PrivateKey(self.mlkem, self.x25519), info=info)


def seal_to(public: bytes, secret: bytes, info: bytes) -> bytes:
    mlkem = MLKEM768PublicKey.from_public_bytes(public[:1184])
    x25519 = X25519PublicKey.from_public_bytes(public[1184:])
    return HPKE.encrypt(secret, MLKEM768X25519PublicKey(mlkem, x25519), info=info)


def make_bundle(
    pair: KemPair, key: Ed25519PrivateKey, certificate: bytes, not_after: int, fingerprint: str
) -> KeyBundle:
    key_id = digest(b"key id", pair.public)[:16]
    bundle = KeyBundle(key_id=key_id, kem_public_key=pair.public, not_after=not_after)
    bundle.identity_certificate, bundle.fingerprint = certificate, fingerprint
    bundle.signature = key.sign(bundle_fields(bundle))
    return bundle


def bundle_fields(bundle: KeyBundle) -> bytes:
    not_after, fingerprint = struct.pack(">q", bundle.not_after), bundle.fingerprint.encode()
    certificate = bundle.identity_certificate
    prices: list[bytes] = []
    if bundle.HasField("prices"):
        rates = struct.pack(">d", bundle.prices.per_gigabyte), struct.pack(">d", bundle.prices.per_petaflop)
        prices = [bundle.prices.currency.encode(), *rates]
    card = [bundle.card_digest] if bundle.card_digest else []
    return fields(
        b"bundle", bundle.key_id, bundle.kem_public_key, not_after, certificate, fingerprint, *prices, *card
    )


def card_digest(dtype: str, files: Sequence[tuple[str, str, int]]) -> bytes:
    values = [dtype.encode()]
    for name, sha256, size in files:
        values += [name.encode(), sha256.encode(), struct.pack(">Q", size)]
    return digest(b"card", *values)


def offer_of(bundle: KeyBundle, request: HandshakeRequest) -> list[bytes]:
    return [
        request.suite.encode(),
        hashlib.sha256(bundle_fields(bundle)).digest(),
        request.key_id,
        request.kem_public_key,
        request.identity_certificate,
        request.cut.encode(),
        request.fingerprint.encode(),
        request.run.encode(),
    ]


@dataclass(frozen=True)
class Keys:
    """What a finished handshake gives."""

    edge_to_cloud: bytes
    cloud_to_edge: bytes
    confirmation: bytes  # the MAC itself


def keys_of(edge_secret: bytes, cloud_secret: bytes, transcript_hash: bytes) -> Keys:
    extracted = mac(transcript_hash, edge_secret + cloud_secret)
    confirmation = mac(expand(extracted, b"confirmation"), transcript_hash)
    return Keys(expand(extracted, b"edge to cloud"), expand(extracted, b"cloud to edge"), confirmation)


def fill_request(
    bundle: KeyBundle, request: HandshakeRequest, key: Ed25519PrivateKey, edge_secret: bytes
) -> None:
    """Seal the edge's secret into a request that has all else, and sign it."""
    offer = offer_of(bundle, request)
    info = digest(b"secret for the cloud", *offer)
    request.sealed_secret = seal_to(bundle.kem_public_key, edge_secret, info)
    request.signature = key.sign(fields(b"request", *offer, request.sealed_secret))


def make_reply(
    pair: KemPair, bundle: KeyBundle, request: HandshakeRequest, cloud_secret: bytes
) -> tuple[HandshakeReply, Keys]:
    offer = offer_of(bundle, request)
    edge_secret = pair.open(request.sealed_secret, digest(b"secret for the cloud", *offer))
    reply = HandshakeReply(session_id=os.urandom(16))
    accepted = [*offer, request.sealed_secret, request.signature, reply.session_id]
    info = digest(b"secret for the edge", *accepted)
    reply.sealed_secret = seal_to(request.kem_public_key, cloud_secret, info)
    keys = keys_of(edge_secret, cloud_secret, digest(b"handshake", *accepted, reply.sealed_secret))
    reply.confirmation = keys.confirmation
    return reply, keys


def read_reply(
    pair: KemPair, bundle: KeyBundle, request: HandshakeRequest, edge_secret: bytes, reply: HandshakeReply
) -> Keys:
    """What the edge derives from a reply."""
    offer = offer_of(bundle, request)
    accepted = [*offer, request.sealed_secret, request.signature, reply.session_id]
    cloud_secret = pair.open(reply.sealed_secret, digest(b"secret for the edge", *accepted))
    return keys_of(edge_secret, cloud_secret, digest(b"handshake", *accepted, reply.sealed_secret))
