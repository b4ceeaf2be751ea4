"""The server's side of a secure aggregation: it routes, adds, and learns the sum and nothing else.

    opening = server.open()                          what to send each participant
    server.receive(client, reply)                    each reply, as it comes
    server.advance()                                 enough came, or time is up: what to send next
    ...                                              keys, shares, masked, consent, unmask
    server.finish()                                  the weighted sum of the survivors

Sans-IO. A reply that is refused raises with its client's name and is as if it had never come: the client has
dropped out, unless it sends a better one before `advance`. Every recovered secret is held against what its
owner committed to, so the sum is right or there is none.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tightbeam.common.errors import IdentityError, IntegrityError, ProtocolError, UpdateRefusedError
from tightbeam.federation.secagg.fixed_point import WeightedSum
from tightbeam.federation.secagg.keys import (
    Roster,
    check_keys,
    mask_commitment,
    pairwise_seed,
    share_sha256,
    verify,
)
from tightbeam.federation.secagg.masks import RingVector, add_mask, ring_dtype
from tightbeam.federation.secagg.messages import (
    Consent,
    Consents,
    Inbox,
    KeyRoll,
    Keys,
    MaskedVector,
    SealedShare,
    Shares,
    Survivors,
    Unmasking,
)
from tightbeam.federation.secagg.plan import Plan
from tightbeam.federation.secagg.shamir import recover

__all__ = ["SecAggServer"]

_Own = TypeVar("_Own", Keys, MaskedVector, Consent, Unmasking)

_EXCHANGES = ("keys", "shares", "masked", "consent", "unmask")


class SecAggServer:
    """One round. `exchange` names the one whose replies are being received."""

    def __init__(self, plan: Plan, roster: Roster) -> None:
        self.plan = plan
        self.exchange = "keys"
        self._roster = roster
        self._expected = set(plan.participants)  # who may reply in this exchange
        self._replied: set[str] = set()
        self._keys: dict[str, Keys] = {}
        self._shares: dict[str, dict[str, SealedShare]] = {}  # dealer -> recipient
        self._survivors: tuple[str, ...] = ()
        self._consents: dict[str, Consent] = {}
        self._returned: dict[str, Unmasking] = {}
        self._total: RingVector = np.zeros(plan.size + 1, ring_dtype(plan.encoding.ring_bits))

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose vectors are in the sum; known after the masked vectors."""
        return self._survivors

    @property
    def dropped(self) -> tuple[str, ...]:
        """Participants that are not in the sum; known after the masked vectors."""
        return tuple(name for name in self.plan.participants if name not in self._survivors)

    def open(self) -> dict[str, bytes]:
        """What to send each participant first: the plan."""
        return dict.fromkeys(self.plan.participants, self.plan.to_bytes())

    def receive(self, client: str, reply: bytes) -> None:
        """Take a client's reply to the present exchange; `client` is whom the transport authenticated.

        Raises:
            IdentityError: keys or a signature that are not the client's own.
            IntegrityError: a returned share that is not the one dealt; the message names its holder.
            ProtocolError: malformed, a second reply, or from a client that is not expected.
            UpdateRefusedError: a masked vector of another length.

        """
        if client not in self._expected or client in self._replied:
            raise ProtocolError(f"{client} sent {self.exchange} twice, or is not in this round any more.")
        take = {
            "keys": self._take_keys,
            "shares": self._take_shares,
            "masked": self._take_masked,
            "consent": self._take_consent,
            "unmask": self._take_unmasking,
        }
        take[self.exchange](client, reply)
        self._replied.add(client)

    def advance(self) -> dict[str, bytes]:
        """Close the exchange and return what to send each client for the next one.

        Raises:
            CohortError: too few replied: the round is over, without a sum.

        """
        assert self.exchange != "unmask", "after the last exchange comes finish()"
        least = self.plan.threshold if self.exchange == "consent" else self.plan.quorum
        self.plan.require(self._replied, least, f"sent {self.exchange}")
        present = sorted(self._replied)
        messages = {
            "keys": self._key_roll,
            "shares": self._inboxes,
            "masked": self._survivor_list,
            "consent": self._consent_list,
        }[self.exchange](present)
        self.exchange = _EXCHANGES[_EXCHANGES.index(self.exchange) + 1]
        self._expected, self._replied = set(present), set()
        return messages

    # ------------------------------------------------------------------------- what clients send

    def _take_keys(self, client: str, reply: bytes) -> None:
        keys = _from(client, Keys.from_bytes(reply))
        check_keys(keys, self.plan, self._roster)
        self._keys[client] = keys

    def _take_shares(self, client: str, reply: bytes) -> None:
        shares = Shares.from_bytes(reply).shares
        dealt = {share.recipient: share for share in shares if share.dealer == client}
        if dealt.keys() != self._keys.keys() or len(shares) != len(dealt):
            raise ProtocolError(f"{client} did not deal one share to each client.", cure=_LEAVE_OUT)
        self._shares[client] = dealt

    def _take_masked(self, client: str, reply: bytes) -> None:
        masked = _from(client, MaskedVector.from_bytes(reply))
        if masked.plan_digest != self.plan.digest:
            raise ProtocolError(f"{client} sent a vector of another round.", cure=_LEAVE_OUT)
        if len(masked.vector) != self.plan.vector_bytes:
            raise UpdateRefusedError(
                f"The vector of {client} has {len(masked.vector)} bytes, not {self.plan.vector_bytes}.",
                cure="All clients need the same adapter config and rank.",
            )
        self._total += np.frombuffer(masked.vector, self._total.dtype)

    def _take_consent(self, client: str, reply: bytes) -> None:
        consent = _from(client, Consent.from_bytes(reply))
        signed = Survivors(self._survivors).signed(self.plan)
        verify(self._roster, client, consent.signature, signed, "the consent and set of survivors")
        self._consents[client] = consent

    def _take_unmasking(self, client: str, reply: bytes) -> None:
        unmasking = _from(client, Unmasking.from_bytes(reply))
        dropouts = self._shares.keys() - set(self._survivors)
        complete = unmasking.mask_shares.keys() == set(self._survivors)
        if unmasking.plan_digest != self.plan.digest or not (
            complete and unmasking.key_shares.keys() == dropouts
        ):
            raise ProtocolError(f"{client} did not return one share of each client.", cure=_LEAVE_OUT)
        self._check_shares(client, unmasking.mask_shares, "mask")
        self._check_shares(client, unmasking.key_shares, "key")
        self._returned[client] = unmasking

    def _check_shares(self, holder: str, shares: Mapping[str, bytes], which: str) -> None:
        for dealer, share in shares.items():
            sealed = self._shares[dealer][holder]
            dealt = sealed.mask_share_sha256 if which == "mask" else sealed.key_share_sha256
            if share_sha256(self.plan, which, dealer, holder, share) != dealt:
                raise IntegrityError(
                    f"The {which} share of {dealer} that {holder} returned is not the one dealt.",
                    cure=f"The round goes on without {holder} if enough others are there.",
                )

    # ------------------------------------------------------------------------- what they get back

    def _key_roll(self, present: list[str]) -> dict[str, bytes]:
        roll = KeyRoll(tuple(self._keys[name] for name in present)).to_bytes()
        return dict.fromkeys(present, roll)

    def _inboxes(self, present: list[str]) -> dict[str, bytes]:
        return {
            name: Inbox(tuple(self._shares[dealer][name] for dealer in present)).to_bytes()
            for name in present
        }

    def _survivor_list(self, present: list[str]) -> dict[str, bytes]:
        self._survivors = tuple(present)
        return dict.fromkeys(present, Survivors(self._survivors).to_bytes())

    def _consent_list(self, present: list[str]) -> dict[str, bytes]:
        consents = Consents(tuple(self._consents[name] for name in present)).to_bytes()
        return dict.fromkeys(present, consents)

    # ------------------------------------------------------------------------- the sum

    def finish(self) -> WeightedSum:
        """Take away all masks and decode the sum.

        Raises:
            CohortError: fewer clients than the threshold returned their shares.
            IntegrityError: a secret that its owner dealt wrongly; the message names the owner.

        """
        assert self.exchange == "unmask"
        self.plan.require(self._returned, self.plan.threshold, "returned their shares")
        for name in self._survivors:
            add_mask(self._total, self._recovered_mask(name), subtract=True)
        for name in sorted(self._shares.keys() - set(self._survivors)):
            key = self._recovered_key(name)
            for survivor in self._survivors:
                # The survivor added this mask if its name comes first, and took it away if not.
                seed = pairwise_seed(self.plan, key, self._keys[name], self._keys[survivor])
                add_mask(self._total, seed, subtract=survivor < name)
        return self.plan.encoding.decode(self._total)

    def _recovered_mask(self, name: str) -> bytes:
        points = {self.plan.point(by): reply.mask_shares[name] for by, reply in self._returned.items()}
        seed = recover(points, self.plan.threshold)
        if mask_commitment(self.plan, name, seed) != self._keys[name].mask_commitment:
            raise _dealt_wrongly(name)
        return seed

    def _recovered_key(self, name: str) -> X25519PrivateKey:
        points = {self.plan.point(by): reply.key_shares[name] for by, reply in self._returned.items()}
        key = X25519PrivateKey.from_private_bytes(recover(points, self.plan.threshold))
        if key.public_key().public_bytes_raw() != self._keys[name].masking_key:
            raise _dealt_wrongly(name)
        return key


def _from(client: str, message: _Own) -> _Own:
    """Whoever sent it must not speak for another."""
    if message.client != client:
        raise IdentityError(f"{client} sent a message in the name of {message.client}.", cure=_LEAVE_OUT)
    return message


def _dealt_wrongly(name: str) -> IntegrityError:
    return IntegrityError(
        f"The secret that {name} shared is not the one that it committed to.",
        cure=f"Run the round again without {name}.",
    )


_LEAVE_OUT = "Leave this client out, and find out why."
