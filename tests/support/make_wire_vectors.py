"""Writes tests/common/wire/vectors: `PYTHONPATH=tests python -m support.make_wire_vectors`.

The record vectors follow from fixed inputs and come out the same each time. Those of the handshake hold the
private keys of one handshake that took place, because sealing is randomised: run this only for a new
protocol.
"""

import hashlib
import json
import struct
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from support import reference_wire as wire
from tightbeam.proto.backbone_pb2 import HandshakeRequest

VECTORS = Path(__file__).parents[1] / "common" / "wire" / "vectors"
NUMBERS = (0, 1, 255, 65535, 65536, 131072)


def record_vectors() -> list[dict[str, str | int]]:
    header = b"header of step 7"
    chunk = b"\x02" + hashlib.sha256(header).digest() + struct.pack(">III", 1, 2, 3)
    secret, session_id = bytes(range(32)), bytes(range(100, 116))
    rows: list[dict[str, str | int]] = []
    for cipher in wire.CIPHERS:
        for index, number in enumerate(NUMBERS):
            direction = 1 + index % 2
            context, plaintext = (b"\x01", header) if index % 3 == 0 else (chunk, bytes(17 * index))
            keys = wire.record_keys(secret, session_id, direction, number, context)
            record = wire.seal_record(cipher, keys, plaintext)
            row = {"context": context, "plaintext": plaintext, "key": keys.key, "iv": keys.iv}
            row |= {"nonce": keys.nonce, "associated_data": keys.associated_data, "record": record}
            row |= {"secret": secret, "session_id": session_id}
            texts = {name: value.hex() for name, value in row.items()}
            rows.append({"cipher": cipher, "direction": direction, "number": number, **texts})
    return rows


def handshake_vector() -> dict[str, str | int]:
    cloud_identity, edge_identity = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
    cloud, edge = wire.KemPair(), wire.KemPair()
    edge_secret, cloud_secret = bytes([3]) * 32, bytes([4]) * 32
    certificate = self_signed(cloud_identity, "tightbeam://cloud")
    bundle = wire.make_bundle(cloud, cloud_identity, certificate, 4102444800, "ab" * 32)
    request = HandshakeRequest(suite="tightbeam/1 X-Wing HKDF-SHA256 AES-256-GCM", key_id=bundle.key_id)
    request.kem_public_key, request.cut, request.fingerprint, request.run = (
        edge.public,
        "4:4",
        "ab" * 32,
        "r1",
    )
    request.identity_certificate = self_signed(edge_identity, "tightbeam://tenant/clinic")
    wire.fill_request(bundle, request, edge_identity, edge_secret)
    reply, keys = wire.make_reply(cloud, bundle, request, cloud_secret)
    values = {
        "cloud_mlkem768_seed": cloud.mlkem.private_bytes_raw(),
        "cloud_x25519_private_key": cloud.x25519.private_bytes_raw(),
        "edge_mlkem768_seed": edge.mlkem.private_bytes_raw(),
        "edge_x25519_private_key": edge.x25519.private_bytes_raw(),
        "edge_secret": edge_secret,
        "cloud_secret": cloud_secret,
        "bundle": bundle.SerializeToString(),
        "request": request.SerializeToString(),
        "reply": reply.SerializeToString(),
        "edge_to_cloud": keys.edge_to_cloud,
        "cloud_to_edge": keys.cloud_to_edge,
    }
    return {name: value.hex() for name, value in values.items()}


def self_signed(key: Ed25519PrivateKey, uri: str) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vector")])
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1)
    builder = builder.not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
    builder = builder.not_valid_after(datetime(2099, 1, 1, tzinfo=UTC)).add_extension(names, critical=False)
    return builder.sign(key, None).public_bytes(Encoding.DER)


if __name__ == "__main__":
    (VECTORS / "records.json").write_text(json.dumps(record_vectors(), indent=1) + "\n")
    (VECTORS / "handshake.json").write_text(json.dumps(handshake_vector(), indent=1) + "\n")
