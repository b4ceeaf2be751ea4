"""The handshake: both sides get equal keys, or one of them says why not; who holds what can open what."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from hypothesis import given, settings
from hypothesis import strategies as st

from support import reference_wire as wire
from tightbeam.common.errors import (
    FingerprintError,
    IdentityError,
    IntegrityError,
    ProtocolError,
    StaleHandshakeError,
)
from tightbeam.common.identity.identities import (
    Identity,
    Role,
    Trust,
    ephemeral_identity,
    init_certificates,
    load_identity,
)
from tightbeam.common.wire.handshake import ClientHandshake, CloudKeys, Session, verify_bundle
from tightbeam.common.wire.key_schedule import SUITES, Transcript, derive_secrets
from tightbeam.proto.backbone_pb2 import HandshakeReply, HandshakeRequest, KeyBundle

DAY_S = 86400.0
AES, CHACHA = SUITES
FINGERPRINT = "ab" * 32


@dataclass(frozen=True)
class World:
    """One authority with a cloud and two clients, and another authority with the same names."""

    cloud: Identity
    clinic: Identity
    lab: Identity
    foreign_cloud: Identity
    foreign_clinic: Identity


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folders: list[Path] = []
    for _ in range(2):
        folders.append(tmp_path_factory.mktemp("certs"))
        init_certificates(folders[-1], clients=["clinic", "lab"])
    own, foreign = folders
    names = [own / "cloud", own / "clinic", own / "lab", foreign / "cloud", foreign / "clinic"]
    return World(*map(load_identity, names))


def start(
    bundle: KeyBundle,
    edge: Identity,
    trust: Trust | None = None,
    suite: str = AES,
    now: float | None = None,
) -> ClientHandshake:
    trust = trust or edge.trust
    return ClientHandshake(
        bundle, edge, trust, cut="4:4", fingerprint=FINGERPRINT, run="run-1", suite=suite, now=now
    )


def shake(keys: CloudKeys, cloud: Identity, edge: Identity, suite: str = AES) -> tuple[Session, Session]:
    handshake = start(keys.bundle, edge, suite=suite)
    reply, at_cloud = keys.accept(handshake.request, cloud.trust)
    return handshake.finish(reply), at_cloud


def assert_connected(at_edge: Session, at_cloud: Session) -> None:
    for sends, receives in ((at_edge, at_cloud), (at_cloud, at_edge)):
        for payload in (b"first", b"second"):
            assert receives.opener.open(sends.sealer.seal(payload)) == payload


@pytest.mark.parametrize("suite", SUITES)
def test_both_sides_get_the_same_session(world: World, suite: str) -> None:
    at_edge, at_cloud = shake(
        CloudKeys.generate(world.cloud, FINGERPRINT), world.cloud, world.clinic, suite=suite
    )
    assert_connected(at_edge, at_cloud)
    assert (at_edge.peer, at_cloud.peer) == ("cloud", "clinic")
    assert at_edge.session_id == at_cloud.session_id
    for session in (at_edge, at_cloud):
        assert (session.cut, session.fingerprint, session.run) == ("4:4", FINGERPRINT, "run-1")


def test_without_an_authority_names_say_insecure() -> None:
    cloud, edge = ephemeral_identity("cloud", Role.CLOUD), ephemeral_identity("me")
    at_edge, at_cloud = shake(CloudKeys.generate(cloud, FINGERPRINT), cloud, edge)
    assert_connected(at_edge, at_cloud)
    assert (at_edge.peer, at_cloud.peer) == ("insecure/cloud", "insecure/me")


def test_sessions_of_one_cloud_share_no_keys(world: World) -> None:
    keys = CloudKeys.generate(world.cloud, FINGERPRINT)
    sessions = [shake(keys, world.cloud, world.clinic) for _ in range(2)]
    assert sessions[0][0].session_id != sessions[1][0].session_id
    with pytest.raises(IntegrityError):
        sessions[1][1].opener.open(sessions[0][0].sealer.seal(b"payload"))
    with pytest.raises(IntegrityError):
        sessions[1][0].opener.open(sessions[1][0].sealer.seal(b"sent back to its sender"))


def flipped(value: bytes, bit: int) -> bytes:
    octets = bytearray(value)
    octets[bit // 8 % len(octets)] ^= 1 << bit % 8
    return bytes(octets)


Message = KeyBundle | HandshakeRequest | HandshakeReply
octet_fields = {
    KeyBundle: ["key_id", "kem_public_key", "identity_certificate", "signature"],
    HandshakeRequest: ["key_id", "kem_public_key", "sealed_secret", "identity_certificate", "signature"],
    HandshakeReply: ["session_id", "sealed_secret", "confirmation"],
}


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_flipped_bit_fails_the_handshake(world: World, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([KeyBundle, HandshakeRequest, HandshakeReply]))
    field = data.draw(st.sampled_from(octet_fields[kind]))
    bit = data.draw(st.integers(0, 8 * 1300 - 1))

    def tamper(message: Message) -> None:
        if isinstance(message, kind):
            setattr(message, field, flipped(getattr(message, field), bit))

    with pytest.raises((IdentityError, ProtocolError)) as caught:
        interfered(world, tamper)
    assert caught.value.cure


def interfered(world: World, tamper: Callable[[Message], None]) -> tuple[Session, Session]:
    """A handshake of which every message passes through other hands."""
    keys = CloudKeys.generate(world.cloud, FINGERPRINT)
    bundle = keys.bundle
    tamper(bundle)
    handshake = start(bundle, world.clinic)
    request = handshake.request
    tamper(request)
    reply, at_cloud = keys.accept(request, world.cloud.trust)
    tamper(reply)
    return handshake.finish(reply), at_cloud


def test_hands_that_change_nothing_are_not_noticed(world: World) -> None:
    assert_connected(*interfered(world, lambda message: None))


CHANGES: dict[str, tuple[type[Message], str, object]] = {
    "bundle lives longer": (KeyBundle, "not_after", 4102444800),
    "other cut": (HandshakeRequest, "cut", "1:1"),
    "other fingerprint": (HandshakeRequest, "fingerprint", "cd" * 32),
    "other run": (HandshakeRequest, "run", "run-2"),
    "run moved into cut": (HandshakeRequest, "cut", "4:4run-1"),
    "downgrade": (HandshakeRequest, "suite", CHACHA),
    "unknown suite": (HandshakeRequest, "suite", "rot13"),
    "endless run": (HandshakeRequest, "run", "x" * 5000),
    "endless certificate": (HandshakeRequest, "identity_certificate", bytes(100_000)),
    "no certificate": (HandshakeRequest, "identity_certificate", b""),
    "key of zeros": (HandshakeRequest, "kem_public_key", bytes(1216)),
    "no KEM key at all": (HandshakeRequest, "kem_public_key", b"\xff" * 1216),
    "cloud key of zeros": (KeyBundle, "kem_public_key", bytes(1216)),
    "other backbone vouched for": (KeyBundle, "fingerprint", "cd" * 32),
    "no backbone vouched for": (KeyBundle, "fingerprint", ""),
    "other files vouched for": (KeyBundle, "card_digest", bytes(32)),
    "endless digest": (KeyBundle, "card_digest", bytes(33)),
    "endless fingerprint": (KeyBundle, "fingerprint", "x" * 300),
    "no signature": (KeyBundle, "signature", b""),
    "short session": (HandshakeReply, "session_id", bytes(15)),
    "short secret": (HandshakeReply, "sealed_secret", bytes(7)),
    "long confirmation": (HandshakeReply, "confirmation", bytes(33)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_changed_field_fails_the_handshake(world: World, change: str) -> None:
    kind, field, value = CHANGES[change]

    def tamper(message: Message) -> None:
        if isinstance(message, kind):
            setattr(message, field, value)

    with pytest.raises((IdentityError, ProtocolError)):
        interfered(world, tamper)


def test_a_signed_key_that_is_none_is_a_protocol_error(world: World) -> None:
    """The sender may be genuine and its message still nonsense."""
    keys = CloudKeys.generate(world.cloud, FINGERPRINT)
    request = HandshakeRequest(suite=AES, key_id=keys.bundle.key_id, kem_public_key=b"\xff" * 1216)
    request.identity_certificate = world.clinic.certificate_der
    wire.fill_request(keys.bundle, request, world.clinic.signing_key, bytes(32))
    with pytest.raises(ProtocolError, match="X-Wing"):
        keys.accept(request, world.cloud.trust)


def test_certificates_of_another_authority_are_refused(world: World) -> None:
    keys, foreign_keys = (
        CloudKeys.generate(world.cloud, FINGERPRINT),
        CloudKeys.generate(world.foreign_cloud, FINGERPRINT),
    )
    with pytest.raises(IdentityError, match=r"cloud's identity.*tightbeam certs init"):
        start(foreign_keys.bundle, world.clinic)
    handshake = start(keys.bundle, world.foreign_clinic, trust=world.cloud.trust)
    with pytest.raises(IdentityError, match="tenant's identity"):
        keys.accept(handshake.request, world.cloud.trust)
    insecure = start(keys.bundle, ephemeral_identity("clinic"))
    with pytest.raises(IdentityError, match="--insecure on both or neither"):
        keys.accept(insecure.request, world.cloud.trust)


def test_nobody_changes_roles(world: World) -> None:
    keys = CloudKeys.generate(world.cloud, FINGERPRINT)
    pair = wire.KemPair()
    of_a_tenant = wire.make_bundle(
        pair, world.lab.signing_key, world.lab.certificate_der, 4102444800, FINGERPRINT
    )
    with pytest.raises(IdentityError, match="Does not name a cloud"):
        start(of_a_tenant, world.clinic)
    with pytest.raises(IdentityError, match="Does not name a tenant"):
        keys.accept(start(keys.bundle, world.cloud).request, world.cloud.trust)


def test_a_certificate_without_its_key_is_worth_nothing(world: World) -> None:
    keys = CloudKeys.generate(world.cloud, FINGERPRINT)
    forged = Identity("clinic", Role.TENANT, world.lab.signing_key, world.clinic.certificate_der)
    request = start(keys.bundle, forged, trust=world.cloud.trust).request
    with pytest.raises(IdentityError, match="signature"):
        keys.accept(request, world.cloud.trust)
    pair = wire.KemPair()
    posing = wire.make_bundle(
        pair, world.lab.signing_key, world.cloud.certificate_der, 4102444800, FINGERPRINT
    )
    with pytest.raises(IdentityError, match="did not sign"):
        start(posing, world.clinic)


def test_a_stolen_bundle_is_worth_nothing(world: World) -> None:
    """A bundle is public: who repeats it cannot finish, and who puts its own key in cannot sign."""
    bundle = CloudKeys.generate(world.cloud, FINGERPRINT).bundle
    handshake, pair = start(bundle, world.clinic), wire.KemPair()
    request = handshake.request
    reply = HandshakeReply(session_id=bytes(16), confirmation=bytes(32))
    reply.sealed_secret = wire.seal_to(
        request.kem_public_key, bytes(32), Transcript(bundle, request, reply).sealing_to_edge
    )
    with pytest.raises(IdentityError, match="did not prove"):
        handshake.finish(reply)
    bundle.kem_public_key = pair.public
    with pytest.raises(IdentityError, match="did not sign"):
        start(bundle, world.clinic)


def test_another_backbone_is_refused_before_anything_is_sent(world: World) -> None:
    bundle = CloudKeys.generate(world.cloud, "cd" * 32).bundle
    assert verify_bundle(bundle, world.clinic.trust) == "cloud"
    with pytest.raises(FingerprintError, match=r"serves the backbone cdcdcdcdcdcd, not abababababab"):
        start(bundle, world.clinic)


def test_a_request_is_for_one_cloud_only(world: World) -> None:
    """A cloud that holds the same key under another bundle still refuses a request made for the first."""
    pair = wire.KemPair()
    key, certificate = world.cloud.signing_key, world.cloud.certificate_der
    first, second = (wire.make_bundle(pair, key, certificate, 4102444800 + n, FINGERPRINT) for n in (0, 1))
    request = start(first, world.clinic).request
    wire.make_reply(pair, first, request, bytes(32))
    with pytest.raises(InvalidTag):
        wire.make_reply(pair, second, request, bytes(32))
    signature, peer = request.signature, world.cloud.trust.verify(request.identity_certificate, Role.TENANT)
    peer.public_key.verify(signature, Transcript(first, request).signed_by_edge)
    with pytest.raises(InvalidSignature):
        peer.public_key.verify(signature, Transcript(second, request).signed_by_edge)


def test_a_replayed_request_gives_the_replayer_nothing(world: World) -> None:
    keys = CloudKeys.generate(world.cloud, FINGERPRINT)
    handshake = start(keys.bundle, world.clinic)
    reply, _ = keys.accept(handshake.request, world.cloud.trust)
    recorded = handshake.finish(reply).sealer.seal(b"recorded")
    _, replayed = keys.accept(handshake.request, world.cloud.trust)
    with pytest.raises(IntegrityError):
        replayed.opener.open(recorded)


def test_the_cloud_key_alone_opens_no_recorded_session(world: World) -> None:
    """Forward secrecy: a thief of the static key and the recording gets s1, but not s2, so no keys."""
    pair = wire.KemPair()
    bundle = wire.make_bundle(
        pair, world.cloud.signing_key, world.cloud.certificate_der, 4102444800, FINGERPRINT
    )
    handshake = start(bundle, world.clinic)
    request = handshake.request
    reply, keys = wire.make_reply(pair, bundle, request, b"2" * 32)
    at_edge = handshake.finish(reply)
    transcript = Transcript(bundle, request, reply)
    edge_secret = pair.open(request.sealed_secret, transcript.sealing_to_cloud)
    with pytest.raises(InvalidTag):
        pair.open(reply.sealed_secret, transcript.sealing_to_edge)
    assert derive_secrets(edge_secret, bytes(32), transcript.hash).edge_to_cloud != keys.edge_to_cloud
    with_both = derive_secrets(edge_secret, b"2" * 32, transcript.hash).edge_to_cloud
    place = wire.record_keys(with_both, at_edge.session_id, wire.EDGE_TO_CLOUD, 0, b"")
    assert wire.open_record("AES-256-GCM", place, at_edge.sealer.seal(b"secret")) == b"secret"


def test_an_expired_bundle_is_refused_on_both_sides(world: World) -> None:
    now = time.time()
    keys = CloudKeys.generate(world.cloud, FINGERPRINT)
    bundle, late = keys.bundle, now + DAY_S + 60
    with pytest.raises(IdentityError, match=r"expired.*Fetch the card again"):
        start(bundle, world.clinic, now=late)
    request = start(bundle, world.clinic).request
    with pytest.raises(IdentityError, match=r"expired or the cloud restarted.*Fetch the card"):
        keys.accept(request, world.cloud.trust, now=late)
    keys.accept(request, world.cloud.trust, now=now)


def test_an_unknown_key_is_refused(world: World) -> None:
    request = start(CloudKeys.generate(world.cloud, FINGERPRINT).bundle, world.clinic).request
    with pytest.raises(StaleHandshakeError, match="cloud restarted") as caught:
        CloudKeys.generate(world.cloud, FINGERPRINT).accept(request, world.cloud.trust)
    assert caught.value.transient


def test_a_bundle_is_announced_for_half_its_life_and_honoured_to_its_end(world: World) -> None:
    keys, now = CloudKeys.generate(world.cloud, FINGERPRINT), time.time()
    first = keys.bundle_at(now)
    assert keys.bundle_at(now + 0.4 * DAY_S) == first
    second = keys.bundle_at(now + 0.6 * DAY_S)
    assert second.key_id != first.key_id
    assert second.not_after == pytest.approx(now + 1.6 * DAY_S, abs=2)
    request = start(first, world.clinic).request
    keys.accept(request, world.cloud.trust, now=now + 0.9 * DAY_S)
    keys.bundle_at(now + 1.1 * DAY_S)
    with pytest.raises(IdentityError):
        keys.accept(request, world.cloud.trust, now=now + 0.9 * DAY_S)


def test_expired_certificates_are_refused(world: World) -> None:
    keys, late = CloudKeys.generate(world.cloud, FINGERPRINT), time.time() + 400 * DAY_S
    late_bundle = keys.bundle_at(late)
    with pytest.raises(IdentityError, match=r"Expired on .*cloud's identity certificate"):
        start(late_bundle, world.clinic, now=late)
    young = start(late_bundle, world.clinic)
    with pytest.raises(IdentityError, match=r"Expired on .*tenant's identity certificate"):
        keys.accept(young.request, world.cloud.trust, now=late)
    early = time.time() - DAY_S
    with pytest.raises(IdentityError, match=r"Not valid before .*clock"):
        keys.accept(young.request, world.cloud.trust, now=early)


def test_what_is_handed_out_is_a_copy(world: World) -> None:
    keys = CloudKeys.generate(world.cloud, FINGERPRINT)
    handshake = start(keys.bundle, world.clinic)
    for message in (keys.bundle, handshake.request):
        before = copy.copy(message)
        message.key_id = b"changed"
        assert before.key_id != b"changed"
    assert keys.bundle.key_id == handshake.request.key_id


def test_a_finished_handshake_holds_no_secret(world: World) -> None:
    keys = CloudKeys.generate(world.cloud, FINGERPRINT)
    handshake = start(keys.bundle, world.clinic)
    reply, _ = keys.accept(handshake.request, world.cloud.trust)
    secret_names = {"_ephemeral", "_edge_secret"}
    assert secret_names < vars(handshake).keys()
    handshake.finish(reply)
    assert not secret_names & vars(handshake).keys()


def test_a_session_does_not_print_its_keys(world: World) -> None:
    at_edge, _ = shake(CloudKeys.generate(world.cloud, FINGERPRINT), world.cloud, world.clinic)
    assert "sealer" not in repr(at_edge)
    assert "opener" not in repr(at_edge)
    assert "secret" not in repr(derive_secrets(b"secret" * 4, b"secret" * 4, bytes(32)))
