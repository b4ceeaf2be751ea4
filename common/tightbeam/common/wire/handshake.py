"""The handshake: one round trip that gives an edge and a cloud the keys of one `Steps` stream.

Sans-IO, over the protobuf messages of the contract:

    cloud -> edge   KeyBundle         the cloud's X-Wing key, the fingerprint of its backbone, its prices and
                                      a digest of its files, signed by its identity (part of the card)
    edge -> cloud   HandshakeRequest  s1 sealed to that key, an ephemeral X-Wing key, all signed by the edge
    cloud -> edge   HandshakeReply    s2 sealed to the ephemeral key, a MAC that proves the same keys

Both secrets go into the keys. Only the cloud opens s1, so the edge knows whom it talks to; only the edge
opens s2, whose key is forgotten with the handshake, so a cloud key stolen later opens nothing that was
recorded before.
HPKE (RFC 9180) with X-Wing keeps both secret from a quantum computer; the signatures are classical.
docs/wire.md has the bytes and what is not protected.
"""

import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from cryptography.exceptions import InvalidSignature

from tightbeam.common.errors import FingerprintError, IdentityError, ProtocolError, StaleHandshakeError
from tightbeam.common.identity.identities import Identity, Role, Trust
from tightbeam.common.wire.kem import KEM_PUBLIC_BYTES, SEALED_SECRET_BYTES, KemKey, seal_secret
from tightbeam.common.wire.key_schedule import (
    SUITES,
    SessionSecrets,
    Transcript,
    bundle_content,
    confirmation,
    derive_secrets,
    key_id_of,
    suite_name,
)
from tightbeam.common.wire.records import SECRET_BYTES, SESSION_ID_BYTES, Aead, Direction, Opener, Sealer
from tightbeam.proto.backbone_pb2 import HandshakeReply, HandshakeRequest, KeyBundle, Prices

__all__ = ["BUNDLE_LIFETIME_S", "ClientHandshake", "CloudKeys", "Session", "verify_bundle"]

BUNDLE_LIFETIME_S = 24 * 3600.0

_SIGNATURE_BYTES = 64
_MAC_BYTES = 32
_DIGEST_BYTES = 32
_MAX_TEXT_BYTES = 256
_MAX_CERTIFICATE_BYTES = 4096
_RETRY = "Connect again; if it happens again, both sides need the same version of tightbeam."


@dataclass(frozen=True, slots=True)
class Session:
    """What a handshake leaves: the keys of one stream, turned to this side, and what they are bound to."""

    session_id: bytes
    peer: str  # "cloud" or the tenant's name; begins with "insecure/" if nobody vouches for it
    cut: str
    fingerprint: str
    run: str
    sealer: Sealer = field(repr=False)
    opener: Opener = field(repr=False)


@dataclass(frozen=True, slots=True)
class _StaticKey:
    kem: KemKey
    bundle: KeyBundle


class CloudKeys:
    """The cloud's side: its current key bundle, and the handshakes that it accepts.

    A key lives in memory for `lifetime_s` and is announced for the first half of it, so that an edge never
    gets a bundle that is about to expire. Not thread-safe: use it from one event loop.
    """

    def __init__(
        self,
        identity: Identity,
        fingerprint: str,
        lifetime_s: float = BUNDLE_LIFETIME_S,
        prices: Prices | None = None,
        card_digest: bytes = b"",
    ) -> None:
        assert identity.role is Role.CLOUD
        self._identity = identity
        self._fingerprint = fingerprint
        self._prices = prices
        self._card_digest = card_digest
        self._lifetime_s = lifetime_s
        self._keys: dict[bytes, _StaticKey] = {}

    @classmethod
    def generate(
        cls,
        identity: Identity,
        fingerprint: str,
        lifetime_s: float = BUNDLE_LIFETIME_S,
        prices: Prices | None = None,
        card_digest: bytes = b"",
    ) -> "CloudKeys":
        """Make the first key; `identity` must be a cloud's, `fingerprint` that of the backbone it serves."""
        keys = cls(identity, fingerprint, lifetime_s, prices, card_digest)
        keys.bundle_at(time.time())
        return keys

    @property
    def bundle(self) -> KeyBundle:
        """The bundle to put into the card now."""
        return self.bundle_at(time.time())

    def bundle_at(self, now: float) -> KeyBundle:
        """Return the bundle to announce at `now` (unix seconds), with a new key if the last one has aged."""
        self._keys = {key_id: key for key_id, key in self._keys.items() if now <= key.bundle.not_after}
        newest = max(self._keys.values(), key=lambda key: key.bundle.not_after, default=None)
        if newest is None or newest.bundle.not_after < now + self._lifetime_s / 2:
            newest = self._make(now)
            self._keys[newest.bundle.key_id] = newest
        return _copy(newest.bundle)

    def _make(self, now: float) -> _StaticKey:
        kem = KemKey()
        bundle = KeyBundle(
            key_id=key_id_of(kem.public),
            kem_public_key=kem.public,
            not_after=int(now + self._lifetime_s),
            identity_certificate=self._identity.certificate_der,
            fingerprint=self._fingerprint,
            prices=self._prices,
            card_digest=self._card_digest,
        )
        bundle.signature = self._identity.signing_key.sign(bundle_content(bundle))
        return _StaticKey(kem, bundle)

    def accept(
        self, request: HandshakeRequest, trust: Trust, now: float | None = None
    ) -> tuple[HandshakeReply, Session]:
        """Answer an edge. The caller then checks cut, fingerprint, run, and that TLS names the same peer.

        Raises IdentityError if the edge is not whom it claims or used another key; ProtocolError on malformed
        messages.
        """
        now = time.time() if now is None else now
        aead = _require_suite(request.suite)
        _require_request_sizes(request)
        static = self._keys.get(request.key_id)
        if static is None or now > static.bundle.not_after:
            raise StaleHandshakeError(
                "The cloud does not hold the key that this handshake was made for: it expired or the cloud "
                "restarted.",
                cure="Fetch the card again and connect anew.",
            )
        peer = trust.verify(request.identity_certificate, Role.TENANT, datetime.fromtimestamp(now, UTC))
        transcript = Transcript(static.bundle, request)
        try:
            peer.public_key.verify(request.signature, transcript.signed_by_edge)
        except InvalidSignature:
            raise IdentityError(
                "The edge's signature does not fit its handshake and this cloud.",
                cure="Check that identity.key belongs to identity.crt, and connect again.",
            ) from None
        edge_secret = static.kem.open_secret(request.sealed_secret, transcript.sealing_to_cloud)
        cloud_secret = secrets.token_bytes(SECRET_BYTES)
        reply = HandshakeReply(session_id=secrets.token_bytes(SESSION_ID_BYTES))
        transcript = Transcript(static.bundle, request, reply)
        reply.sealed_secret = seal_secret(cloud_secret, request.kem_public_key, transcript.sealing_to_edge)
        keys = derive_secrets(edge_secret, cloud_secret, transcript.hash)
        reply.confirmation = confirmation(keys, transcript.hash)
        return reply, _session(transcript, peer.name, keys, aead, Direction.CLOUD_TO_EDGE)


class ClientHandshake:
    """The edge's side of one handshake, for one stream of one run at one cut of one model.

    Raises IdentityError or ProtocolError for a bundle that cannot be trusted, FingerprintError for a cloud
    that serves another model.
    """

    def __init__(
        self,
        bundle: KeyBundle,
        identity: Identity,
        trust: Trust,
        *,
        cut: str,
        fingerprint: str,
        run: str,
        suite: str = suite_name(Aead.AES_256_GCM),
        now: float | None = None,
    ) -> None:
        self._aead = _require_suite(suite)
        self._peer = verify_bundle(bundle, trust, now)
        if bundle.fingerprint != fingerprint:
            raise FingerprintError(
                f"The cloud serves the backbone {bundle.fingerprint[:12]}, not {fingerprint[:12]}.",
                cure="Connect to the cloud that the weights came from, or load the model anew from this.",
            )
        self._bundle = _copy(bundle)
        self._ephemeral = KemKey()
        self._edge_secret = secrets.token_bytes(SECRET_BYTES)
        self._request = HandshakeRequest(
            suite=suite,
            key_id=bundle.key_id,
            kem_public_key=self._ephemeral.public,
            identity_certificate=identity.certificate_der,
            cut=cut,
            fingerprint=fingerprint,
            run=run,
        )
        transcript = Transcript(self._bundle, self._request)
        self._request.sealed_secret = seal_secret(
            self._edge_secret, bundle.kem_public_key, transcript.sealing_to_cloud
        )
        self._request.signature = identity.signing_key.sign(transcript.signed_by_edge)
        _require_request_sizes(self._request)

    @property
    def request(self) -> HandshakeRequest:
        """The message to send; a copy."""
        return _copy(self._request)

    def finish(self, reply: HandshakeReply) -> Session:
        """Check the cloud's answer, once, and forget the secrets; raises IdentityError or ProtocolError."""
        _require_size("session_id", reply.session_id, SESSION_ID_BYTES)
        _require_size("sealed_secret", reply.sealed_secret, SEALED_SECRET_BYTES)
        _require_size("confirmation", reply.confirmation, _MAC_BYTES)
        transcript = Transcript(self._bundle, self._request, reply)
        cloud_secret = self._ephemeral.open_secret(reply.sealed_secret, transcript.sealing_to_edge)
        keys = derive_secrets(self._edge_secret, cloud_secret, transcript.hash)
        if not hmac.compare_digest(reply.confirmation, confirmation(keys, transcript.hash)):
            raise IdentityError("The cloud did not prove that it holds the announced key.", cure=_RETRY)
        del self._ephemeral, self._edge_secret
        return _session(transcript, self._peer, keys, self._aead, Direction.EDGE_TO_CLOUD)


_AnyMessage = TypeVar("_AnyMessage", KeyBundle, HandshakeRequest)


def _copy(message: _AnyMessage) -> _AnyMessage:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _session(
    transcript: Transcript, peer: str, keys: SessionSecrets, aead: Aead, sends: Direction
) -> Session:
    session_id, request = transcript.reply.session_id, transcript.request
    secret_of: Mapping[Direction, bytes] = {
        Direction.EDGE_TO_CLOUD: keys.edge_to_cloud,
        Direction.CLOUD_TO_EDGE: keys.cloud_to_edge,
    }
    receives = Direction(3 - sends)
    return Session(
        session_id,
        peer,
        request.cut,
        request.fingerprint,
        request.run,
        Sealer(secret_of[sends], session_id, sends, aead),
        Opener(secret_of[receives], session_id, receives, aead),
    )


def verify_bundle(bundle: KeyBundle, trust: Trust, now: float | None = None) -> str:
    """Return the cloud's name if its identity signed this bundle and it is good at `now` (unix seconds).

    Only then the bundle's `fingerprint`, `prices` and `card_digest` are the cloud's own; the card itself is
    unsigned.
    """
    now = time.time() if now is None else now
    _require_size("kem_public_key", bundle.kem_public_key, KEM_PUBLIC_BYTES)
    _require_size("signature", bundle.signature, _SIGNATURE_BYTES)
    _require_at_most("identity_certificate", len(bundle.identity_certificate), _MAX_CERTIFICATE_BYTES)
    _require_at_most("fingerprint", len(bundle.fingerprint.encode()), _MAX_TEXT_BYTES)
    _require_at_most("card_digest", len(bundle.card_digest), _DIGEST_BYTES)
    _require_at_most("currency", len(bundle.prices.currency.encode()), _MAX_TEXT_BYTES)
    peer = trust.verify(bundle.identity_certificate, Role.CLOUD, datetime.fromtimestamp(now, UTC))
    try:
        peer.public_key.verify(bundle.signature, bundle_content(bundle))
    except InvalidSignature:
        raise IdentityError(
            "The cloud's identity did not sign the key that it announces.",
            cure="Do not connect: something between edge and cloud alters the traffic. Ask the operator.",
        ) from None
    if bundle.key_id != key_id_of(bundle.kem_public_key):
        raise ProtocolError("The cloud's key does not have the name that it announces.", cure=_RETRY)
    if now > bundle.not_after:
        raise IdentityError(
            "The cloud's announced key has expired.",
            cure="Fetch the card again; if it stays so, set the clocks of edge and cloud.",
        )
    return peer.name


def _require_request_sizes(request: HandshakeRequest) -> None:
    _require_size("kem_public_key", request.kem_public_key, KEM_PUBLIC_BYTES)
    _require_size("sealed_secret", request.sealed_secret, SEALED_SECRET_BYTES)
    _require_size("signature", request.signature, _SIGNATURE_BYTES)
    _require_at_most("identity_certificate", len(request.identity_certificate), _MAX_CERTIFICATE_BYTES)
    for name in ("cut", "fingerprint", "run"):
        _require_at_most(name, len(getattr(request, name).encode()), _MAX_TEXT_BYTES)


def _require_suite(suite: str) -> Aead:
    if suite not in SUITES:
        raise ProtocolError(f"Unknown suite {suite[:80]!r}.", cure=f"Use one of: {', '.join(SUITES)}.")
    return SUITES[suite]


def _require_size(name: str, value: bytes, num_bytes: int) -> None:
    if len(value) != num_bytes:
        raise ProtocolError(f"{name} has {len(value)} bytes, not {num_bytes}.", cure=_RETRY)


def _require_at_most(name: str, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise ProtocolError(f"{name} has {num_bytes} bytes, at most {limit} are allowed.", cure=_RETRY)
