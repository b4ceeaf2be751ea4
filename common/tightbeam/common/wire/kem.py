"""X-Wing keys and the sealing of one 32-byte secret to them, by HPKE.

X-Wing joins ML-KEM-768 and X25519 so that a secret stays one while either of them holds. HPKE is used in its
single-shot base mode (RFC 9180, 5.1.1 and 6.1), once per key pair and direction of a handshake.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from tightbeam.common.errors import IdentityError, ProtocolError
from tightbeam.common.wire.records import SECRET_BYTES, TAG_BYTES

__all__ = ["KEM_PUBLIC_BYTES", "SEALED_SECRET_BYTES", "KemKey", "seal_secret"]

_HPKE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_MLKEM_PUBLIC_BYTES = 1184
KEM_PUBLIC_BYTES = _MLKEM_PUBLIC_BYTES + 32
SEALED_SECRET_BYTES = KEM.MLKEM768_X25519.enc_length() + SECRET_BYTES + TAG_BYTES


class KemKey:
    """An X-Wing key pair, in memory only. `public` is the ML-KEM-768 key (1184 bytes) and the X25519 key."""

    def __init__(self) -> None:
        mlkem, x25519 = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
        self._private = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def open_secret(self, sealed_secret: bytes, info: bytes) -> bytes:
        """Return the secret that was sealed to this key under `info`; raises IdentityError."""
        try:
            secret = _HPKE.decrypt(sealed_secret, self._private, info=info)
        except (InvalidTag, ValueError):
            raise IdentityError(
                "The handshake was not made for this key, or was altered on its way.",
                cure="Connect again. If it happens again, something on the way alters the traffic.",
            ) from None
        assert len(secret) == SECRET_BYTES, "the size of the sealed secret is checked before"
        return secret


def seal_secret(secret: bytes, kem_public_key: bytes, info: bytes) -> bytes:
    """Seal a secret to a peer's key under `info`; raises ProtocolError if it is not a key."""
    assert len(secret) == SECRET_BYTES
    try:
        public = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(kem_public_key[:_MLKEM_PUBLIC_BYTES]),
            X25519PublicKey.from_public_bytes(kem_public_key[_MLKEM_PUBLIC_BYTES:]),
        )
        return _HPKE.encrypt(secret, public, info=info)
    except ValueError as error:
        raise ProtocolError(
            "The peer's key is not an X-Wing public key.",
            cure="Connect again; if it happens again, both sides need the same version of tightbeam.",
        ) from error
