"""Known answers, and the second implementation of docs/wire.md against the first, both ways round."""

import json
import os
from pathlib import Path
from typing import cast

import pytest

from support import make_wire_vectors
from support import reference_wire as wire
from tightbeam.common.identity.identities import Role, ephemeral_identity
from tightbeam.common.wire.handshake import ClientHandshake, CloudKeys
from tightbeam.common.wire.key_schedule import (
    SUITES,
    Transcript,
    bundle_content,
    card_digest,
    confirmation,
    derive_secrets,
    suite_name,
)
from tightbeam.common.wire.records import (
    Aead,
    Direction,
    Opener,
    Sealer,
    chunk_context,
    header_context,
    header_digest,
    next_secret,
    traffic_key,
)
from tightbeam.proto.backbone_pb2 import Blob, Card, HandshakeReply, HandshakeRequest, KeyBundle, Prices

VECTORS = Path(__file__).parent / "vectors"
FINGERPRINT = "ab" * 32
Row = dict[str, str | int]
RECORDS: list[Row] = json.loads((VECTORS / "records.json").read_text())


def octets(row: Row, name: str) -> bytes:
    return bytes.fromhex(cast(str, row[name]))


def test_record_vectors_are_those_of_the_specification() -> None:
    assert make_wire_vectors.record_vectors() == RECORDS


@pytest.mark.parametrize("cipher", [aead.value for aead in Aead])
@pytest.mark.parametrize("direction", Direction)
def test_sealer_and_opener_give_the_frozen_records(cipher: str, direction: Direction) -> None:
    rows = {row["number"]: row for row in RECORDS if (row["cipher"], row["direction"]) == (cipher, direction)}
    first = next(iter(rows.values()))
    secret, session_id = octets(first, "secret"), octets(first, "session_id")
    sealer, opener = (kind(secret, session_id, direction, Aead(cipher)) for kind in (Sealer, Opener))
    assert isinstance(sealer, Sealer)
    assert isinstance(opener, Opener)
    checked = 0
    for number in range(max(cast(int, number) for number in rows) + 1):
        row = rows.get(number)
        context, plaintext = (b"", b"") if row is None else (octets(row, "context"), octets(row, "plaintext"))
        record = sealer.seal(plaintext, context)
        assert opener.open(record, context) == plaintext
        if row is not None:
            assert record == octets(row, "record")
            checked += 1
    assert checked == len(rows) == 3


@pytest.mark.parametrize("row", RECORDS, ids=lambda row: f"{row['cipher']} {row['number']}")
def test_key_schedule_gives_the_frozen_keys(row: Row) -> None:
    secret = octets(row, "secret")
    for _ in range(cast(int, row["number"]) >> 16):
        secret = next_secret(secret)
    key = traffic_key(secret)
    assert (key.key, key.iv) == (octets(row, "key"), octets(row, "iv"))


def test_contexts_have_the_specified_layout() -> None:
    digest = header_digest(b"header of step 7")
    contexts = {octets(row, "context") for row in RECORDS}
    assert contexts == {header_context(), chunk_context(digest, 1, 2, 3)}


def test_handshake_vector_opens_and_derives_the_frozen_secrets() -> None:
    row: Row = json.loads((VECTORS / "handshake.json").read_text())
    bundle = KeyBundle.FromString(octets(row, "bundle"))
    request = HandshakeRequest.FromString(octets(row, "request"))
    reply = HandshakeReply.FromString(octets(row, "reply"))
    cloud, edge = (
        wire.KemPair.from_private(
            octets(row, f"{side}_mlkem768_seed"), octets(row, f"{side}_x25519_private_key")
        )
        for side in ("cloud", "edge")
    )
    transcript = Transcript(bundle, request, reply)
    edge_secret = cloud.open(request.sealed_secret, transcript.sealing_to_cloud)
    cloud_secret = edge.open(reply.sealed_secret, transcript.sealing_to_edge)
    assert (edge_secret, cloud_secret) == (octets(row, "edge_secret"), octets(row, "cloud_secret"))
    keys = derive_secrets(edge_secret, cloud_secret, transcript.hash)
    assert keys.edge_to_cloud == octets(row, "edge_to_cloud")
    assert keys.cloud_to_edge == octets(row, "cloud_to_edge")
    assert confirmation(keys, transcript.hash) == reply.confirmation


def test_a_bundle_that_vouches_for_files_has_the_specified_bytes() -> None:
    files = [("file/tokenizer.json", "ab" * 32, 1 << 33), ("file/config.json", "cd" * 32, 7)]
    card = Card(dtype="bfloat16", blobs=[Blob(name=n, sha256=s, num_bytes=b) for n, s, b in files])
    card.blobs.add(name="block.0", sha256="ef" * 32, num_bytes=1)  # the fingerprint's
    assert card_digest(card) == wire.card_digest("bfloat16", files)
    row: Row = json.loads((VECTORS / "handshake.json").read_text())
    bundle = KeyBundle.FromString(octets(row, "bundle"))
    for prices in (None, Prices(currency="EUR", per_gigabyte=1.0)):
        for signed in (b"", card_digest(card)):
            full = KeyBundle(prices=prices, card_digest=signed)
            full.MergeFrom(bundle)
            assert bundle_content(full) == wire.bundle_fields(full)


@pytest.mark.parametrize("suite", SUITES)
def test_a_reference_edge_talks_to_the_cloud(suite: str) -> None:
    edge, pair, secret = ephemeral_identity("clinic"), wire.KemPair(), os.urandom(32)
    keys = CloudKeys.generate(ephemeral_identity("cloud", Role.CLOUD), FINGERPRINT)
    request = HandshakeRequest(suite=suite, key_id=keys.bundle.key_id, kem_public_key=pair.public)
    request.identity_certificate, request.cut, request.run = edge.certificate_der, "1:1", "r"
    wire.fill_request(keys.bundle, request, edge.signing_key, secret)
    reply, session = keys.accept(request, edge.trust)
    derived = wire.read_reply(pair, keys.bundle, request, secret, reply)
    assert reply.confirmation == derived.confirmation
    sealed = session.sealer.seal(b"hello", b"context")
    place = wire.record_keys(derived.cloud_to_edge, reply.session_id, wire.CLOUD_TO_EDGE, 0, b"context")
    assert wire.open_record(SUITES[suite].value, place, sealed) == b"hello"


@pytest.mark.parametrize("suite", SUITES)
def test_a_reference_cloud_talks_to_the_edge(suite: str) -> None:
    edge, cloud, pair = ephemeral_identity("clinic"), ephemeral_identity("cloud", Role.CLOUD), wire.KemPair()
    bundle = wire.make_bundle(pair, cloud.signing_key, cloud.certificate_der, 4102444800, FINGERPRINT)
    handshake = ClientHandshake(
        bundle, edge, edge.trust, cut="1:1", fingerprint=FINGERPRINT, run="r", suite=suite
    )
    reply, derived = wire.make_reply(pair, bundle, handshake.request, os.urandom(32))
    session = handshake.finish(reply)
    place = wire.record_keys(derived.edge_to_cloud, reply.session_id, wire.EDGE_TO_CLOUD, 0, b"")
    assert wire.open_record(SUITES[suite].value, place, session.sealer.seal(b"hello")) == b"hello"


def test_suites_are_named_as_specified() -> None:
    assert suite_name(Aead.AES_256_GCM) == "tightbeam/1 X-Wing HKDF-SHA256 AES-256-GCM"
    assert suite_name(Aead.CHACHA20_POLY1305) == "tightbeam/1 X-Wing HKDF-SHA256 ChaCha20-Poly1305"
