"""A client's side of a secure aggregation: five exchanges, each a method that takes bytes and returns bytes.

    join(plan) -> share(key roll) -> mask(inbox, values, weight) -> consent(survivors) -> unmask(consents)

Sans-IO: whoever carries the bytes calls the methods. What protects the client is checked here and nowhere
else, since the server is the one to be protected from:

* Each round number is used once: a replayed plan, or one already seen, is refused.
* A model is answered for one cohort, in whatever round, run or federation it is asked: see `answered`.
* Keys count only under a signature of the roster, for this very plan (round, model, participants).
* No step is taken twice. So a client masks one vector, signs one set of survivors and answers one unmasking.
* Of each peer it returns one share: of the own mask if the peer survived, else of its masking key. Which one
  follows from the set that it signed itself, not from what the server asks for.

`state` and `restore` carry a client over to another process between two exchanges (Flower starts one for each
message). Store the new state **before** sending the reply: a client that masks two vectors with one mask
gives away their difference.
"""

import os
from collections.abc import Callable, Collection
from typing import Any, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from tightbeam.common.errors import CohortError, FederationError, IdentityError, ProtocolError
from tightbeam.federation.secagg.answered import Answered
from tightbeam.federation.secagg.framing import fields, split
from tightbeam.federation.secagg.keys import Roster, RoundSecrets, check_keys, verify
from tightbeam.federation.secagg.masks import SEED_BYTES, add_mask
from tightbeam.federation.secagg.messages import (
    Consent,
    Consents,
    Inbox,
    KeyRoll,
    MaskedVector,
    Shares,
    Survivors,
    Unmasking,
)
from tightbeam.federation.secagg.plan import Plan

__all__ = ["SecAggClient"]

_STEPS = ("join", "share", "mask", "consent", "unmask")


class SecAggClient:
    """One client over all of its rounds.

    `min_cohort` is this client's own policy, whatever the plan says: with fewer clients in a sum, it does not
    take part. `last_round` is the latest round number it ever joined, `answered` what it has consented to.
    """

    def __init__(
        self,
        name: str,
        signing_key: Ed25519PrivateKey,
        roster: Roster,
        *,
        min_cohort: int = 3,
        last_round: int = -1,
        answered: Answered | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.name = name
        self.last_round = last_round
        self._signing_key = signing_key
        self._roster = roster
        self._min_cohort = min_cohort
        self._answered: Answered = {} if answered is None else answered
        self._entropy = entropy
        self._forget()

    def _forget(self) -> None:
        self._seed = b""
        self._received: list[bytes] = []

    @property
    def plan(self) -> Plan:
        """The terms of the round that this client is in."""
        assert self._received, "there is a plan once `join` was taken"
        return self._plan

    def state(self) -> bytes:
        """Everything that another process needs to go on. Secret: it holds the round's seed."""
        return fields("client state", self.last_round.to_bytes(8, signed=True), self._seed, *self._received)

    def restore(self, state: bytes) -> Self:
        """Go on from what `state` returned; the name, key and roster are this object's own."""
        label, last_round, seed, *received = split(state)
        if fields("client state") != len(label).to_bytes(4) + label:
            raise ProtocolError("This is no state of a secure aggregation client.")
        self.last_round, self._seed = int.from_bytes(last_round, signed=True), seed
        accept = (self._accept_plan, self._accept_roll, self._accept_inbox, self._accept_survivors)
        self._received = []
        for step, message in zip(accept, received, strict=False):
            step(message)
            self._received.append(message)
        return self

    def restore_number(self, state: bytes) -> Self:
        """Take over the latest round number and nothing else: all that a new round needs of the one before.

        That one may never have ended for this client, and its peers may be on no roster any more.
        """
        label, last_round, *_ = split(state)
        if fields("client state") != len(label).to_bytes(4) + label:
            raise ProtocolError("This is no state of a secure aggregation client.")
        self.last_round = int.from_bytes(last_round, signed=True)
        return self

    # 1 ------------------------------------------------------------------------------------------ keys

    def join(self, plan: bytes) -> bytes:
        """Take part in a new round, whatever became of the one before; returns `Keys`.

        Raises:
            FederationError: terms that this client does not accept.
            CohortError: too small a cohort, or without some for whom the model was answered before.
            ProtocolError: an earlier round, or this one again.

        """
        proposed = Plan.from_bytes(plan)
        if proposed.round <= self.last_round:
            raise ProtocolError(
                f"Round {proposed.round} was proposed to {self.name} after round {self.last_round}.",
                cure="Each attempt takes a new, larger round number.",
            )
        self._check_terms(proposed)
        self._forget()
        self.last_round, self._seed = proposed.round, self._entropy(SEED_BYTES)
        self._accept_plan(plan)
        self._received.append(plan)
        return self._secrets.keys(self._signing_key).to_bytes()

    def _check_terms(self, plan: Plan) -> None:
        if self.name not in plan.participants:
            raise FederationError(f"{self.name} is not among the participants.", cure="Ask its operator.")
        strangers = sorted(set(plan.participants) - self._roster.keys())
        if strangers:
            raise IdentityError(
                f"{', '.join(strangers)}: not on the roster of {self.name}.",
                cure="Give every client the same roster.",
            )
        if plan.min_cohort < self._min_cohort:
            raise CohortError(
                f"Round {plan.round} may sum as few as {plan.min_cohort} clients.",
                cure=f"{self.name} hides among {self._min_cohort} or more: raise the plan's min_cohort.",
            )
        if missing := set(self._answered.get(plan.model_sha256) or ()) - set(plan.participants):
            raise self._other_cohort(missing)

    def _accept_plan(self, plan: bytes) -> None:
        self._plan = Plan.from_bytes(plan)
        self._secrets = RoundSecrets(self._seed, self._plan, self.name)

    # 2 ---------------------------------------------------------------------------------------- shares

    def share(self, key_roll: bytes) -> bytes:
        """Share the secrets among all whose keys are in order; returns `Shares`.

        Raises:
            IdentityError: keys that are not signed by the roster for this round; own keys that were altered.
            CohortError: too few clients are in.

        """
        self._expect("share")
        self._accept_roll(key_roll)
        self._received.append(key_roll)
        return Shares(tuple(self._secrets.deal_to(self._keys))).to_bytes()

    def _accept_roll(self, data: bytes) -> None:
        roll = KeyRoll.from_bytes(data)
        for keys in roll.keys:
            check_keys(keys, self._plan, self._roster)
        by_name = {keys.client: keys for keys in roll.keys}
        if by_name.get(self.name) != self._secrets.keys(self._signing_key):
            raise IdentityError(f"The key roll holds other keys of {self.name} than it sent.", cure=_STOP)
        self._require_quorum(by_name, "sent keys")
        self._keys = by_name

    # 3 ---------------------------------------------------------------------------------------- masked

    def mask(self, inbox: bytes, values: NDArray[np.floating[Any]], weight: int) -> bytes:
        """Encode `values`, hide them under all masks and return a `MaskedVector`.

        Raises:
            IntegrityError: a share that was altered on its way; the message names its dealer.
            CohortError: too few clients dealt shares.
            UpdateRefusedError: values or weight that the encoding cannot hold.

        """
        self._expect("mask")
        self._accept_inbox(inbox)
        if values.size != self._plan.size:
            raise FederationError(
                f"{self.name} has {values.size} values, and round {self._plan.round} sums {self._plan.size}.",
                cure="All clients need the same adapter config and rank.",
            )
        vector = self._plan.encoding.encode(values, weight, self.name)
        add_mask(vector, self._secrets.mask_seed)
        own = self._keys[self.name]
        for peer in sorted(self._shares.keys() - {self.name}):
            seed = self._secrets.pairwise_seed(own, self._keys[peer])
            add_mask(vector, seed, subtract=self.name > peer)
        self._received.append(inbox)
        return MaskedVector(self.name, self._plan.digest, vector.tobytes()).to_bytes()

    def _accept_inbox(self, data: bytes) -> None:
        shares: dict[str, tuple[bytes, bytes]] = {}
        for sealed in Inbox.from_bytes(data).shares:
            if sealed.dealer not in self._keys or sealed.dealer in shares:
                raise ProtocolError(
                    f"A share of {sealed.dealer} came twice, or without its keys.", cure=_STOP
                )
            dealer = self._keys[sealed.dealer]
            shares[sealed.dealer] = self._secrets.open(sealed, self._keys[self.name], dealer)
        self._require_quorum(shares, "dealt shares")
        self._shares = shares

    # 4 --------------------------------------------------------------------------------------- consent

    def consent(self, survivors: bytes) -> bytes:
        """Sign the one set of clients whose sum may be unmasked; returns a `Consent`.

        Raises:
            CohortError: too few clients are in it, or others than those for whom the model was answered.
            ProtocolError: it leaves this client out, or has some who dealt no shares.

        """
        self._expect("consent")
        self._accept_survivors(survivors)
        names = self._survivors.names
        if other := set(self._answered.setdefault(self._plan.model_sha256, names)) ^ set(names):
            raise self._other_cohort(other)
        self._received.append(survivors)
        return Consent(self.name, self._signing_key.sign(self._survivors.signed(self._plan))).to_bytes()

    def _accept_survivors(self, data: bytes) -> None:
        survivors = Survivors.from_bytes(data)
        if not {self.name} <= set(survivors.names) <= self._shares.keys():
            raise ProtocolError("The survivors are not those who took part.", cure=_STOP)
        self._require_quorum(survivors.names, "sent a vector")
        self._survivors = survivors

    # 5 ---------------------------------------------------------------------------------------- unmask

    def unmask(self, consents: bytes) -> bytes:
        """Return one share of every peer, once enough of them signed the same set; returns `Unmasking`.

        This ends the round: the secrets are forgotten.

        Raises:
            IdentityError: a signature that is not over the set that this client signed.
            CohortError: fewer signatures than the threshold.

        """
        self._expect("unmask")
        signed = self._survivors.signed(self._plan)
        consenting = Consents.from_bytes(consents).consents
        for each in consenting:
            if each.client not in self._survivors.names:
                raise ProtocolError(f"{each.client} consents, but is no survivor.", cure=_STOP)
            verify(self._roster, each.client, each.signature, signed, "the consent and set of survivors")
        self._plan.require([each.client for each in consenting], self._plan.threshold, "consented")
        survived = set(self._survivors.names)
        mask_shares = {peer: pair[0] for peer, pair in self._shares.items() if peer in survived}
        key_shares = {peer: pair[1] for peer, pair in self._shares.items() if peer not in survived}
        reply = Unmasking(self.name, self._plan.digest, mask_shares, key_shares).to_bytes()
        self._forget()
        return reply

    def _expect(self, step: str) -> None:
        due = _STEPS[len(self._received)]
        if due != step:
            raise ProtocolError(
                f"{self.name} was asked to {step}, and the next step of its round is to {due}.",
                cure="A step is taken once: start a new round.",
            )

    def _other_cohort(self, names: Collection[str]) -> CohortError:
        return CohortError(
            f"{self.name} answered this model for a cohort that differs by {', '.join(sorted(names))}.",
            cure="The two sums would show what they differ by: ask the same clients, or take another seed.",
        )

    def _require_quorum(self, names: Collection[str], did: str) -> None:
        self._plan.require(names, max(self._plan.quorum, self._min_cohort), did)


_STOP = "Somebody tampers with this round: find out who before the next one."
