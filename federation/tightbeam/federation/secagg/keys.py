"""The keys of one client in one round, and what two clients derive from each other's.

Everything secret about a client's round grows from one seed of 32 random bytes: two X25519 keys, the seed of
its own mask and the polynomials of its shares. Each comes by HKDF under its own label and the plan's digest,
so none tells anything about another: the server may recover the masking key and learns nothing about the
rest. Peers are told apart by name: every derived key is bound to both names and both public keys.
"""

from collections.abc import Callable, Iterable, Mapping

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from tightbeam.common.errors import IdentityError, IntegrityError
from tightbeam.common.identity.identities import Role, Trust
from tightbeam.federation.secagg.framing import digest, fields
from tightbeam.federation.secagg.masks import SEED_BYTES
from tightbeam.federation.secagg.messages import Keys, SealedShare
from tightbeam.federation.secagg.plan import Plan
from tightbeam.federation.secagg.shamir import SHARE_BYTES, deal

__all__ = [
    "Roster",
    "RoundSecrets",
    "check_keys",
    "mask_commitment",
    "pairwise_seed",
    "roster_from",
    "share_sha256",
    "verify",
]

Roster = Mapping[str, Ed25519PublicKey]
"""Who may take part: name to identity key. Clients must have it from somebody else than the server."""

_NONCE = bytes(12)  # every sealing key seals one message


def roster_from(certificates_der: Iterable[bytes], trust: Trust) -> dict[str, Ed25519PublicKey]:
    """Build a roster from the clients' identity certificates, whoever delivered them.

    The server may, since it cannot make one: only the deployment's authority can.

    Raises:
        IdentityError: a certificate that the authority did not issue to a tenant, or two of one name.

    """
    roster: dict[str, Ed25519PublicKey] = {}
    for certificate in certificates_der:
        peer = trust.verify(certificate, Role.TENANT)
        if peer.name in roster:
            raise IdentityError(f"The roster has two certificates of {peer.name}.", cure="Keep one of them.")
        roster[peer.name] = peer.public_key
    return roster


class RoundSecrets:
    """A client's secrets of one round, all derived from `seed`."""

    def __init__(self, seed: bytes, plan: Plan, name: str) -> None:
        assert len(seed) == SEED_BYTES
        self._seed, self._plan, self._name = seed, plan, name
        self._sealing = X25519PrivateKey.from_private_bytes(self._derive("sealing key"))
        self._masking_secret = self._derive("masking key")
        self._masking = X25519PrivateKey.from_private_bytes(self._masking_secret)
        self.mask_seed = self._derive("own mask")

    def _derive(self, label: str) -> bytes:
        return HKDFExpand(SHA256(), 32, fields(label, self._plan.digest)).derive(self._seed)

    def keys(self, signing_key: Ed25519PrivateKey) -> Keys:
        """Return the public halves, signed by the client's identity."""
        sealing = self._sealing.public_key().public_bytes_raw()
        masking = self._masking.public_key().public_bytes_raw()
        commitment = mask_commitment(self._plan, self._name, self.mask_seed)
        unsigned = Keys(self._name, sealing, masking, commitment, b"")
        return Keys(self._name, sealing, masking, commitment, signing_key.sign(unsigned.signed(self._plan)))

    def deal_to(self, peers: Mapping[str, Keys]) -> list[SealedShare]:
        """Share mask seed and masking key among `peers` (this client too) and seal each one's pair."""
        points = [self._plan.point(peer) for peer in sorted(peers)]
        threshold = self._plan.threshold
        mask_shares = deal(self.mask_seed, threshold, points, self._stream("mask polynomial"))
        key_shares = deal(self._masking_secret, threshold, points, self._stream("key polynomial"))
        return [
            self._seal(peers[self._name], peers[peer], mask_shares[point], key_shares[point])
            for peer, point in zip(sorted(peers), points, strict=True)
        ]

    def _stream(self, label: str) -> Callable[[int], bytes]:
        stream = Cipher(AES256(self._derive(label)), CTR(bytes(16))).encryptor()
        return lambda count: stream.update(bytes(count))

    def _seal(self, own: Keys, peer: Keys, mask_share: bytes, key_share: bytes) -> SealedShare:
        shell = SealedShare(
            own.client,
            peer.client,
            share_sha256(self._plan, "mask", own.client, peer.client, mask_share),
            share_sha256(self._plan, "key", own.client, peer.client, key_share),
            b"",
        )
        cipher = AESGCM(self._sealing_secret(own, peer, peer))
        ciphertext = cipher.encrypt(_NONCE, mask_share + key_share, shell.to_bytes())
        return SealedShare(
            shell.dealer, shell.recipient, shell.mask_share_sha256, shell.key_share_sha256, ciphertext
        )

    def open(self, sealed: SealedShare, own: Keys, dealer: Keys) -> tuple[bytes, bytes]:
        """Return a dealer's share of its mask and of its masking key.

        Raises:
            IntegrityError: altered on its way, meant for another, or not what the dealer committed to.

        """
        shell = SealedShare(
            sealed.dealer, sealed.recipient, sealed.mask_share_sha256, sealed.key_share_sha256, b""
        )
        try:
            cipher = AESGCM(self._sealing_secret(dealer, own, dealer))
            plaintext = cipher.decrypt(_NONCE, sealed.ciphertext, shell.to_bytes())
        except InvalidTag:
            raise _tampered(dealer.client, own.client) from None
        mask_share, key_share = plaintext[:SHARE_BYTES], plaintext[SHARE_BYTES:]
        dealt = [
            share_sha256(self._plan, which, dealer.client, own.client, share)
            for which, share in (("mask", mask_share), ("key", key_share))
        ]
        if dealt != [sealed.mask_share_sha256, sealed.key_share_sha256]:
            raise _tampered(dealer.client, own.client)
        return mask_share, key_share

    def _sealing_secret(self, dealer: Keys, recipient: Keys, peer: Keys) -> bytes:
        """Return the key that seals what `dealer` sends `recipient`; `peer` is the other one of the two."""
        names = (dealer.client.encode(), recipient.client.encode())
        info = fields("seal", *names, dealer.sealing_key, recipient.sealing_key)
        return _agree(self._sealing, peer.sealing_key, self._plan, info, peer.client)

    def pairwise_seed(self, own: Keys, peer: Keys) -> bytes:
        """Seed of the mask that this client and a peer share."""
        return pairwise_seed(self._plan, self._masking, own, peer)


def pairwise_seed(plan: Plan, masking_key: X25519PrivateKey, own: Keys, peer: Keys) -> bytes:
    """Seed of the mask of two clients, from the private masking key of one and the public of the other."""
    lower, higher = sorted((own, peer), key=lambda keys: keys.client)
    names = (lower.client.encode(), higher.client.encode())
    info = fields("pairwise mask", *names, lower.masking_key, higher.masking_key)
    return _agree(masking_key, peer.masking_key, plan, info, peer.client)


def _agree(private: X25519PrivateKey, public: bytes, plan: Plan, info: bytes, peer: str) -> bytes:
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of small order: the shared secret would be zero
        raise IdentityError(f"The round key of {peer} is no usable X25519 key.", cure=_LEAVE_OUT) from error
    return HKDF(SHA256(), 32, plan.digest, info).derive(shared)


def mask_commitment(plan: Plan, client: str, mask_seed: bytes) -> bytes:
    """Commitment to a client's own mask; the seed has 256 random bits, so its hash hides it."""
    return digest("mask commitment", plan.digest, client.encode(), mask_seed)


def share_sha256(plan: Plan, which: str, dealer: str, holder: str, share: bytes) -> bytes:
    """Commitment to one share, so that a wrong one can be told and its holder named."""
    return digest(f"{which} share", plan.digest, dealer.encode(), holder.encode(), share)


def check_keys(keys: Keys, plan: Plan, roster: Roster) -> None:
    """Hold a client's round keys against the roster.

    Raises:
        IdentityError: not a participant, not on the roster, not signed by it, or signed for another round.

    """
    if keys.client not in plan.participants:
        raise IdentityError(f"{keys.client} is not a participant of round {plan.round}.", cure=_LEAVE_OUT)
    verify(roster, keys.client, keys.signature, keys.signed(plan), f"round {plan.round}'s keys")


def verify(roster: Roster, client: str, signature: bytes, signed: bytes, what: str) -> None:
    """Check a client's signature over `signed`; raises IdentityError with the client's name."""
    if client not in roster:
        raise IdentityError(f"{client} is not on the roster.", cure="Add its identity key, or leave it out.")
    try:
        roster[client].verify(signature, signed)
    except InvalidSignature:
        raise IdentityError(
            f"{what[0].upper()}{what[1:]} of {client} are not signed by its identity on the roster.",
            cure="Somebody else made them, or they are of another round. " + _LEAVE_OUT,
        ) from None


_LEAVE_OUT = "Leave this client out, and find out who speaks for it."


def _tampered(dealer: str, recipient: str) -> IntegrityError:
    return IntegrityError(
        f"The share that {dealer} dealt to {recipient} does not authenticate.",
        cure="The server or the dealer altered it: do not go on with this round.",
    )
