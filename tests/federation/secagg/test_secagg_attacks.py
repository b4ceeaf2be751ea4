"""Forged, replayed, altered: each attack on a round is refused, and the one behind it named."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.secagg_rounds import NEVER, Round, Tamper, identity_of, make_plan, names
from tightbeam.common.errors import (
    CohortError,
    FederationError,
    IdentityError,
    IntegrityError,
    ProtocolError,
    UpdateRefusedError,
)
from tightbeam.common.identity.identities import Trust, ephemeral_identity, init_certificates, load_identity
from tightbeam.federation.secagg import FixedPoint, SecAggClient, SecAggServer, roster_from
from tightbeam.federation.secagg import keys as keys_module
from tightbeam.federation.secagg.keys import RoundSecrets
from tightbeam.federation.secagg.messages import (
    Inbox,
    KeyRoll,
    Keys,
    MaskedVector,
    SealedShare,
    Shares,
    Survivors,
    Unmasking,
)

A, B, C, D, E = names(5)


def mallory_signs(exchange: str, client: str, data: bytes) -> bytes:
    if exchange != "keys" or client != B:
        return data
    keys = Keys.from_bytes(data)
    return replace(keys, signature=identity_of("mallory").sign(keys.signed(make_plan()))).to_bytes()


def unsigned(exchange: str, client: str, data: bytes) -> bytes:
    is_ours = exchange == "keys" and client == B
    return replace(Keys.from_bytes(data), signature=b"").to_bytes() if is_ours else data


def other_key(exchange: str, client: str, data: bytes) -> bytes:
    is_ours = exchange == "keys" and client == B
    return replace(Keys.from_bytes(data), masking_key=b"\x09" + bytes(31)).to_bytes() if is_ours else data


@pytest.mark.parametrize("forge", [mallory_signs, unsigned, other_key])
def test_the_server_refuses_forged_keys_and_names_them(forge: Tamper) -> None:
    with pytest.raises(IdentityError, match=f"keys of {B} are not signed by its identity"):
        Round(make_plan(), tamper_up=forge).run()


@pytest.mark.parametrize("forge", [mallory_signs, unsigned, other_key])
def test_the_clients_refuse_keys_that_the_server_swapped(forge: Tamper) -> None:
    """The server in the middle: it would read every share if clients took its keys for B's."""

    def swap(exchange: str, client: str, data: bytes) -> bytes:
        if exchange != "shares":
            return data
        roll = KeyRoll.from_bytes(data)
        return KeyRoll(
            tuple(Keys.from_bytes(forge("keys", k.client, k.to_bytes())) for k in roll.keys)
        ).to_bytes()

    with pytest.raises(IdentityError, match=f"keys of {B} are not signed by its identity"):
        Round(make_plan(), tamper_down=swap).run()


def test_a_client_notices_that_its_own_keys_were_left_out() -> None:
    def leave_out(exchange: str, client: str, data: bytes) -> bytes:
        if exchange != "shares":
            return data
        return KeyRoll(tuple(k for k in KeyRoll.from_bytes(data).keys if k.client != A)).to_bytes()

    with pytest.raises(IdentityError, match=f"other keys of {A} than it sent"):
        Round(make_plan(), tamper_down=leave_out).run()


def test_a_stranger_is_refused_by_both_sides() -> None:
    plan = make_plan()
    roster = {name: identity_of(name).public_key() for name in (A, B, C, D)}
    stranger = SecAggClient(E, identity_of(E), roster | {E: identity_of(E).public_key()}, min_cohort=2)
    keys = stranger.join(plan.to_bytes())
    with pytest.raises(IdentityError, match=f"{E} is not on the roster"):
        SecAggServer(plan, roster).receive(E, keys)
    with pytest.raises(IdentityError, match=f"{E}: not on the roster of {A}"):
        SecAggClient(A, identity_of(A), roster).join(plan.to_bytes())


def test_a_roster_is_made_of_the_authoritys_certificates(tmp_path: Path) -> None:
    ward, lab = (ephemeral_identity(name) for name in ("ward", "lab"))
    roster = roster_from([ward.certificate_der, lab.certificate_der], Trust.anyone())
    assert roster.keys() == {"insecure/ward", "insecure/lab"}
    assert roster["insecure/lab"] == lab.signing_key.public_key()
    with pytest.raises(IdentityError, match="two certificates of insecure/ward"):
        roster_from([ward.certificate_der, ephemeral_identity("ward").certificate_der], Trust.anyone())
    init_certificates(tmp_path, clients=["clinic"])
    clinic = load_identity(tmp_path / "clinic")
    assert roster_from([clinic.certificate_der], clinic.trust).keys() == {"clinic"}
    with pytest.raises(IdentityError):
        roster_from([ward.certificate_der], clinic.trust)  # which nobody vouches for


def test_nobody_speaks_for_another() -> None:
    def as_b(exchange: str, client: str, data: bytes) -> bytes:
        if exchange == "masked" and client == A:
            return replace(MaskedVector.from_bytes(data), client=B).to_bytes()
        return data

    with pytest.raises(IdentityError, match=f"{A} sent a message in the name of {B}"):
        Round(make_plan(), tamper_up=as_b).run()


def test_a_key_of_small_order_is_refused() -> None:
    """It would make the shared secret zero for anybody to know; signed or not."""

    def weaken(exchange: str, client: str, data: bytes) -> bytes:
        if exchange != "keys" or client != B:
            return data
        keys = replace(Keys.from_bytes(data), sealing_key=bytes(32))
        return replace(keys, signature=identity_of(B).sign(keys.signed(make_plan()))).to_bytes()

    trial = Round(make_plan(), tamper_up=weaken)
    with pytest.raises(IdentityError, match=f"round key of {B} is no usable X25519 key"):
        trial.run({B: 1})


def test_an_earlier_round_is_not_joined_again() -> None:
    trial = Round(make_plan())
    trial.run()
    for number in (0, 1):
        with pytest.raises(ProtocolError, match=f"Round {number} was proposed to {A} after round 1"):
            trial.clients[A].join(make_plan(round=number).to_bytes())
    trial.clients[A].join(make_plan(round=2).to_bytes())


def test_keys_and_vectors_of_an_earlier_round_are_refused() -> None:
    earlier = Round(make_plan())
    earlier.run()
    later = Round(make_plan(round=2))
    with pytest.raises(IdentityError, match=f"keys of {A} are not signed .* of another round"):
        later.server.receive(A, earlier.replies["keys", A])

    for exchange, error in (("masked", ProtocolError), ("consent", IdentityError), ("unmask", ProtocolError)):
        with pytest.raises(error, match=A):
            Round(make_plan(round=2), tamper_up=replaying(earlier, exchange)).run()


def replaying(earlier: Round, exchange: str) -> Tamper:
    """Client A's reply to this exchange is the one that it gave in another round."""
    return lambda now, client, data: earlier.replies[now, client] if (now, client) == (exchange, A) else data


@pytest.mark.parametrize("change", ["federation", "model_sha256", "min_cohort", "participants"])
def test_a_signature_counts_for_one_plan_only(change: str) -> None:
    """Round, model and participants are in what is signed: a model of another kind each would be seen."""
    others: dict[str, Any] = {
        "federation": "banks",
        "model_sha256": bytes(32),
        "min_cohort": 3,
        "participants": tuple(names(4)),
    }
    keys = Keys.from_bytes(Round(make_plan()).clients[A].join(make_plan().to_bytes()))
    other = SecAggServer(make_plan(**{change: others[change]}), {A: identity_of(A).public_key()})
    with pytest.raises(IdentityError, match=f"keys of {A} are not signed"):
        other.receive(A, keys.to_bytes())


def test_no_step_is_taken_twice_or_out_of_order() -> None:
    trial = Round(make_plan())
    trial.run(until="consent")
    with pytest.raises(ProtocolError, match=f"{A} was asked to mask, and the next step .* is to unmask"):
        trial.clients[A].mask(trial.sent["masked", A], trial.values(A), 1)
    with pytest.raises(ProtocolError, match="asked to consent"):
        trial.clients[A].consent(Survivors((A, B, C)).to_bytes())
    with pytest.raises(ProtocolError, match=f"{A} sent consent twice"):
        trial.server.receive(A, trial.replies["consent", A])


@pytest.mark.parametrize("what", ["ciphertext", "commitment", "recipient"])
def test_a_share_altered_on_its_way_is_detected_and_its_dealer_named(what: str) -> None:
    def tamper(exchange: str, client: str, data: bytes) -> bytes:
        if exchange != "masked" or client != A:
            return data
        altered = []
        for share in Inbox.from_bytes(data).shares:
            if share.dealer == C:
                flipped = bytes([share.ciphertext[0] ^ 1]) + share.ciphertext[1:]
                changes = {
                    "ciphertext": replace(share, ciphertext=flipped),
                    "commitment": replace(share, key_share_sha256=bytes(32)),
                    "recipient": replace(share, recipient=B),
                }
                share = changes[what]
            altered.append(share)
        return Inbox(tuple(altered)).to_bytes()

    with pytest.raises(IntegrityError, match=f"share that {C} dealt to {A} does not authenticate"):
        Round(make_plan(), tamper_down=tamper).run()


def lying(liar: str, which: str, dealer: str) -> Tamper:
    """A client that returns another share of a dealer's mask or key than it was dealt."""

    def tamper(exchange: str, client: str, data: bytes) -> bytes:
        if exchange != "unmask" or client != liar:
            return data
        reply = Unmasking.from_bytes(data)
        shares = reply.mask_shares if which == "mask" else reply.key_shares
        shares[dealer] = bytes(32) + b"\x01"
        return reply.to_bytes()

    return tamper


@pytest.mark.parametrize(("which", "dealer"), [("mask", B), ("key", D)])
def test_a_wrong_share_is_named_and_the_round_goes_on_without_its_holder(which: str, dealer: str) -> None:
    trial = Round(make_plan(), tamper_up=lying(A, which, dealer))
    with pytest.raises(IntegrityError, match=f"{which} share of {dealer} that {A} returned is not the one"):
        trial.run({D: 2})
    consents = trial.sent["unmask", A]
    for name in (B, C, E):
        trial.server.receive(name, trial.clients[name].unmask(consents))
    trial.assert_exact()


@pytest.mark.parametrize("drop", [NEVER, 2])
def test_a_dealer_who_shares_another_secret_is_named(drop: int) -> None:
    """Without commitments the sum would be garbage and nobody could say by whom."""
    trial = Round(make_plan())
    original = RoundSecrets.deal_to

    def deal_other(self: RoundSecrets, peers: Mapping[str, Keys]) -> list[SealedShare]:
        if self.keys(identity_of(B)) == peers[B]:
            self.mask_seed = self._masking_secret = bytes(32)
        return original(self, peers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundSecrets, "deal_to", deal_other)
        trial.run({B: drop})
    with pytest.raises(IntegrityError, match=f"secret that {B} shared is not the one .* committed to"):
        trial.server.finish()


def test_a_dealer_cannot_frame_a_holder() -> None:
    """Sealing one share and committing to another would make the holder's honest answer look like a lie."""
    trial = Round(make_plan())
    trial.run(until="keys")
    for name, roll in trial.server.advance().items():
        with pytest.MonkeyPatch.context() as patch:
            if name == B:
                patch.setattr(keys_module, "share_sha256", lambda *_: bytes(32))
            trial.server.receive(name, trial.clients[name].share(roll))
    inboxes = trial.server.advance()
    with pytest.raises(IntegrityError, match=f"share that {B} dealt to {A} does not authenticate"):
        trial.clients[A].mask(inboxes[A], trial.values(A), 1)


def test_a_dealer_must_deal_to_everybody() -> None:
    def forget_one(exchange: str, client: str, data: bytes) -> bytes:
        if exchange != "shares" or client != B:
            return data
        return Shares(Shares.from_bytes(data).shares[1:]).to_bytes()

    with pytest.raises(ProtocolError, match=f"{B} did not deal one share to each client"):
        Round(make_plan(), tamper_up=forget_one).run()


def test_a_vector_of_another_length_is_refused_on_both_sides() -> None:
    trial = Round(make_plan())
    with pytest.raises(FederationError, match=f"{A} has 39 values, and round 1 sums 40"):
        trial.run(inputs={name: np.zeros(39) for name in names(5)})

    def cut(exchange: str, client: str, data: bytes) -> bytes:
        if exchange != "masked":
            return data
        masked = MaskedVector.from_bytes(data)
        return replace(masked, vector=masked.vector[:-8]).to_bytes()

    with pytest.raises(UpdateRefusedError, match=f"vector of {A} has 320 bytes, not 328"):
        Round(make_plan(), tamper_up=cut).run()


def test_an_update_that_is_no_number_never_leaves_its_client() -> None:
    trial = Round(make_plan())
    spoiled = {name: np.full(40, np.nan if name == C else 0.0) for name in names(5)}
    with pytest.raises(UpdateRefusedError, match=f"40 of 40 values of {C}"):
        trial.run(inputs=spoiled)
    assert ("masked", C) not in trial.replies


def test_a_client_has_its_own_minimum_cohort() -> None:
    with pytest.raises(CohortError, match=f"as few as 2 clients.*{A} hides among 3 or more"):
        Round(make_plan(), min_cohort=3).run()


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 2},  # no majority of 5
        {"threshold": 6},
        {"min_cohort": 1},
        {"min_cohort": 6},
        {"participants": (B, A, C)},
        {"participants": (A, A, B)},
        {"model_sha256": b"short"},
        {"encoding": FixedPoint.fitting(8.0, 10, 4)},
    ],
)
def test_impossible_terms_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FederationError):
        make_plan(**changes)


def test_who_is_not_asked_does_not_join() -> None:
    with pytest.raises(FederationError, match="mallory is not among the participants"):
        SecAggClient("mallory", identity_of("mallory"), {}).join(make_plan().to_bytes())
