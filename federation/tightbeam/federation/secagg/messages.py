"""What clients and server of a secure aggregation tell each other, as dataclasses that become bytes.

    exchange    server -> client          client -> server
    1 keys      Plan                      Keys            two X25519 keys, signed by the client's identity
    2 shares    KeyRoll (all Keys)        Shares          a sealed share for each peer
    3 masked    Inbox (shares for you)    MaskedVector
    4 consent   Survivors                 Consent         signature over plan and survivors
    5 unmask    Consents                  Unmasking       one share per client: of its mask or of its key

Each exchange costs a message each way. The state machines are in client.py and server.py.
"""

from dataclasses import dataclass, field
from typing import Self

from tightbeam.federation.secagg.framing import Message, fields, join, names_of, split
from tightbeam.federation.secagg.plan import Plan

__all__ = [
    "Consent",
    "Consents",
    "Inbox",
    "KeyRoll",
    "Keys",
    "MaskedVector",
    "SealedShare",
    "Shares",
    "Survivors",
    "Unmasking",
]


@dataclass(frozen=True, slots=True)
class Keys(Message):
    """A client's keys for one round, and a commitment to its own mask, signed by its identity."""

    kind = "keys"
    client: str
    sealing_key: bytes  # X25519: peers seal shares to it; its private half never leaves the client
    masking_key: bytes  # X25519: gives the pairwise masks; its private half is shared among the peers
    mask_commitment: bytes  # SHA-256, so that a recovered seed can be checked
    signature: bytes

    def signed(self, plan: Plan) -> bytes:
        """What the client's identity signs: the keys, for this round only."""
        return fields(
            "signed keys",
            plan.digest,
            self.client.encode(),
            self.sealing_key,
            self.masking_key,
            self.mask_commitment,
        )

    def _fields(self) -> list[bytes]:
        keys = [self.sealing_key, self.masking_key, self.mask_commitment]
        return [self.client.encode(), *keys, self.signature]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        client, sealing, masking, commitment, signature = values
        if not len(sealing) == len(masking) == len(commitment) == 32:
            raise ValueError("keys have 32 bytes")
        return cls(client.decode(), sealing, masking, commitment, signature)


@dataclass(frozen=True, slots=True)
class KeyRoll(Message):
    """The keys of all clients that are in, sorted by name."""

    kind = "key roll"
    keys: tuple[Keys, ...]

    def _fields(self) -> list[bytes]:
        return [keys.to_bytes() for keys in self.keys]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        keys = tuple(Keys.from_bytes(value) for value in values)
        names_of(each.client.encode() for each in keys)
        return cls(keys)


@dataclass(frozen=True, slots=True)
class SealedShare(Message):
    """The two shares of a dealer's secrets for one recipient, sealed between the two of them."""

    kind = "sealed share"
    dealer: str
    recipient: str
    mask_share_sha256: bytes  # what the server will hold a returned share against
    key_share_sha256: bytes
    ciphertext: bytes = field(repr=False)

    def _fields(self) -> list[bytes]:
        ends = [self.dealer.encode(), self.recipient.encode()]
        return [*ends, self.mask_share_sha256, self.key_share_sha256, self.ciphertext]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        dealer, recipient, mask, key, ciphertext = values
        return cls(dealer.decode(), recipient.decode(), mask, key, ciphertext)


@dataclass(frozen=True, slots=True)
class _SealedShares(Message):
    shares: tuple[SealedShare, ...]

    def _fields(self) -> list[bytes]:
        return [share.to_bytes() for share in self.shares]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        return cls(tuple(SealedShare.from_bytes(value) for value in values))


class Shares(_SealedShares):
    """What one dealer deals, to all peers."""

    __slots__ = ()
    kind = "shares"


class Inbox(_SealedShares):
    """What all dealers dealt, to one recipient."""

    __slots__ = ()
    kind = "inbox"


@dataclass(frozen=True, slots=True)
class MaskedVector(Message):
    """A client's encoded vector under all of its masks; to the server it is random."""

    kind = "masked vector"
    client: str
    plan_digest: bytes
    vector: bytes = field(repr=False)  # little-endian elements of the ring

    def _fields(self) -> list[bytes]:
        return [self.client.encode(), self.plan_digest, self.vector]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        client, plan_digest, vector = values
        return cls(client.decode(), plan_digest, vector)


@dataclass(frozen=True, slots=True)
class Survivors(Message):
    """Whose masked vectors arrived: these and no others are in the sum."""

    kind = "survivors"
    names: tuple[str, ...]

    def signed(self, plan: Plan) -> bytes:
        """What each survivor signs: round, model and participants (all in the plan's digest) and this set."""
        return fields("consent", plan.digest, *self._fields())

    def _fields(self) -> list[bytes]:
        return [name.encode() for name in self.names]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        return cls(names_of(values))


@dataclass(frozen=True, slots=True)
class Consent(Message):
    """A survivor's signature over `Survivors.signed`."""

    kind = "one consent"
    client: str
    signature: bytes

    def _fields(self) -> list[bytes]:
        return [self.client.encode(), self.signature]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        client, signature = values
        return cls(client.decode(), signature)


@dataclass(frozen=True, slots=True)
class Consents(Message):
    """The signatures of those who are still there, sorted by name."""

    kind = "consents"
    consents: tuple[Consent, ...]

    def _fields(self) -> list[bytes]:
        return [consent.to_bytes() for consent in self.consents]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        consents = tuple(Consent.from_bytes(value) for value in values)
        names_of(each.client.encode() for each in consents)
        return cls(consents)


@dataclass(frozen=True, slots=True)
class Unmasking(Message):
    """A client's shares: of the own mask of each survivor, of the masking key of each one who dropped out."""

    kind = "unmasking"
    client: str
    plan_digest: bytes
    mask_shares: dict[str, bytes] = field(repr=False)
    key_shares: dict[str, bytes] = field(repr=False)

    def _fields(self) -> list[bytes]:
        pairs = [
            join(part for name in sorted(shares) for part in (name.encode(), shares[name]))
            for shares in (self.mask_shares, self.key_shares)
        ]
        return [self.client.encode(), self.plan_digest, *pairs]

    @classmethod
    def _parse(cls, values: list[bytes]) -> Self:
        client, plan_digest, masks, keys = values
        mask_shares, key_shares = _pairs(masks), _pairs(keys)
        return cls(client.decode(), plan_digest, mask_shares, key_shares)


def _pairs(data: bytes) -> dict[str, bytes]:
    parts = split(data)
    names = names_of(parts[::2])
    return dict(zip(names, parts[1::2], strict=True))
