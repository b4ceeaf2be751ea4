"""What the server sees: everything that crosses it tells the sum and no summand.

The statistics run over seeded rounds, so they pass or fail the same way every time; each has a control in
which the same test catches a leak.
"""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from support.secagg_rounds import Round, identity_of, make_plan, names
from tightbeam.common.errors import CohortError, IdentityError, ProtocolError
from tightbeam.federation.secagg.keys import pairwise_seed
from tightbeam.federation.secagg.masks import RingVector, add_mask, ring_dtype
from tightbeam.federation.secagg.messages import (
    Consent,
    Consents,
    Keys,
    MaskedVector,
    Survivors,
    Unmasking,
)
from tightbeam.federation.secagg.shamir import recover

A, B, C, D, E = names(5)
ROUNDS, SIZE = 25, 400
DEGREES = 4 * 255  # four bytes of an element, each uniform
LIMIT = DEGREES + 5 * np.sqrt(2 * DEGREES)  # five standard deviations above the mean of chi-square

Inputs = dict[str, NDArray[np.float64]]


def histogram(vectors: list[RingVector]) -> NDArray[np.int64]:
    """How often each byte value comes at each of an element's four places."""
    octets = np.concatenate(vectors).view(np.uint8).reshape(-1, 4).astype(np.int64)
    return np.bincount((octets + 256 * np.arange(4)).ravel(), minlength=4 * 256)


def chi_square(vectors: list[RingVector]) -> float:
    """Distance from uniform bytes."""
    counts = histogram(vectors)
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_between(one: list[RingVector], other: list[RingVector]) -> float:
    """Distance between two samples of the same size."""
    left, right = histogram(one), histogram(other)
    return float(((left - right) ** 2 / np.maximum(left + right, 1)).sum())


def masked_vectors(trial: Round) -> dict[str, RingVector]:
    """The vectors as the server got them."""
    return {
        name: np.frombuffer(MaskedVector.from_bytes(data).vector, ring_dtype(32)).copy()
        for (exchange, name), data in trial.replies.items()
        if exchange == "masked"
    }


def recovered_masks(trial: Round) -> dict[str, bytes]:
    """The seeds of the survivors' own masks, as the server recovers them."""
    replies = {
        name: Unmasking.from_bytes(data)
        for (exchange, name), data in trial.replies.items()
        if exchange == "unmask"
    }
    return {
        dealer: recover(
            {trial.plan.point(holder): reply.mask_shares[dealer] for holder, reply in replies.items()},
            trial.plan.threshold,
        )
        for dealer in trial.server.survivors
    }


def two_inputs_with_one_sum() -> tuple[Inputs, Inputs]:
    """Far apart for every client; equal in sum under the weights 1, 2, 3."""
    zero, eight = np.zeros(SIZE), np.full(SIZE, 7.5)
    one = {"client-000": eight, "client-001": zero, "client-002": zero}
    other = {"client-000": zero, "client-001": zero, "client-002": eight / 3}
    return one, other


def views(inputs: Inputs, seed_offset: int) -> list[Round]:
    trials = []
    for number in range(ROUNDS):
        trial = Round(make_plan(3, size=SIZE, ring_bits=32), seed=seed_offset + number)
        trial.run(inputs=inputs)
        trials.append(trial)
    return trials


ONE, OTHER = two_inputs_with_one_sum()
VIEWS_ONE, VIEWS_OTHER = views(ONE, 1000), views(OTHER, 2000)


@pytest.mark.parametrize("name", names(3))
def test_masked_vectors_of_two_inputs_look_the_same(name: str) -> None:
    """...and like random bytes, although the inputs could not differ more."""
    one, other = ([masked_vectors(trial)[name] for trial in trials] for trials in (VIEWS_ONE, VIEWS_OTHER))
    assert chi_square(one) < LIMIT
    assert chi_square(other) < LIMIT
    assert chi_square_between(one, other) < LIMIT


def test_unmasked_vectors_would_not() -> None:
    plan = make_plan(3, size=SIZE, ring_bits=32)
    one, other = ([plan.encoding.encode(inputs["client-000"], 1, "ward")] * ROUNDS for inputs in (ONE, OTHER))
    assert chi_square(one) > 100 * LIMIT
    assert chi_square_between(one, other) > 10 * LIMIT


def partial_sum(trial: Round, group: tuple[str, ...]) -> RingVector:
    """The most that the server can make of a group's vectors: their sum without their own masks."""
    vectors, seeds = masked_vectors(trial), recovered_masks(trial)
    total = np.zeros(SIZE + 1, ring_dtype(32))
    for name in group:
        add_mask(vectors[name], seeds[name], subtract=True)
        total += vectors[name]
    return total


@pytest.mark.parametrize("group", [g for n in (1, 2) for g in itertools.combinations(names(3), n)])
def test_after_the_round_every_smaller_sum_still_looks_random(group: tuple[str, ...]) -> None:
    """With the own masks gone, the pairwise masks across the group's border are what hides it."""
    assert chi_square([partial_sum(trial, group) for trial in VIEWS_ONE]) < LIMIT


def test_the_sum_of_all_does_not() -> None:
    everyone = tuple(names(3))
    sums = [partial_sum(trial, everyone) for trial in VIEWS_ONE]
    assert chi_square(sums) > 100 * LIMIT
    expected = VIEWS_ONE[0].server.finish()
    np.testing.assert_array_equal(VIEWS_ONE[0].plan.encoding.decode(sums[0]).total, expected.total)


def test_a_late_vector_of_a_dropout_stays_hidden() -> None:
    """The server has all pairwise masks of D then; D's own mask, of which nobody gave a share, covers it."""
    leftovers = []
    for number in range(ROUNDS):
        trial = Round(make_plan(5, size=SIZE, ring_bits=32), seed=3000 + number)
        trial.run({D: 3}, until="masked")
        late = masked_vectors(trial)[D]
        kept = Round(make_plan(5, size=SIZE, ring_bits=32), seed=3000 + number)
        kept.run({D: 2})
        recovered = kept.server._recovered_key(D)
        keys = {name: Keys.from_bytes(kept.replies["keys", name]) for name in names(5)}
        for peer in (A, B, C, E):
            seed = pairwise_seed(kept.plan, recovered, keys[D], keys[peer])
            add_mask(late, seed, subtract=peer > D)
        leftovers.append(late)
        without_own_mask = late.copy()
        add_mask(without_own_mask, kept.clients[D]._secrets.mask_seed, subtract=True)
        plain = kept.plan.encoding.encode(kept.values(D), kept.weight(D), D)
        np.testing.assert_array_equal(without_own_mask, plain)  # the control: one mask fewer and it is open
    assert chi_square(leftovers) < LIMIT


# ------------------------------------------------------------------------- never both shares of one client


@pytest.mark.parametrize("dropouts", [(), (D,), (B, D)])
def test_nobody_returns_both_shares_of_a_client(dropouts: tuple[str, ...]) -> None:
    trial = Round(make_plan())
    trial.run(dict.fromkeys(dropouts, 2))
    for name in trial.server.survivors:
        reply = Unmasking.from_bytes(trial.replies["unmask", name])
        assert not reply.mask_shares.keys() & reply.key_shares.keys()
        assert set(reply.key_shares) == set(dropouts)
    for name in dropouts:  # nor do all together hold a share of a dropout's own mask
        assert all(
            name not in Unmasking.from_bytes(trial.replies["unmask", by]).mask_shares
            for by in trial.server.survivors
        )


def up_to_consent() -> Round:
    trial = Round(make_plan())
    trial.run(until="masked")
    return trial


def consents_to(trial: Round, survivors: Survivors, signers: tuple[str, ...]) -> bytes:
    """What colluding clients could sign for a set of their choice."""
    signed = survivors.signed(trial.plan)
    return Consents(tuple(Consent(name, identity_of(name).sign(signed)) for name in signers)).to_bytes()


def test_the_server_is_refused_a_second_set_of_survivors() -> None:
    trial = up_to_consent()
    trial.clients[A].consent(Survivors((A, B, C, D, E)).to_bytes())
    with pytest.raises(ProtocolError, match=r"asked to consent, and the next step .* is to unmask"):
        trial.clients[A].consent(Survivors((A, B, C)).to_bytes())


def test_the_server_is_refused_shares_for_a_set_that_the_client_did_not_sign() -> None:
    """One set for some, another for others: the way to get both shares of D. The signatures show it."""
    trial = up_to_consent()
    everyone, without_d = Survivors((A, B, C, D, E)), Survivors((A, B, C, E))
    trial.clients[A].consent(without_d.to_bytes())
    with pytest.raises(IdentityError, match=f"consent and set of survivors of {A} are not signed"):
        trial.clients[A].unmask(consents_to(trial, everyone, (A, B, C)))


def test_a_minority_of_signatures_unmasks_nothing() -> None:
    trial = up_to_consent()
    everyone = Survivors((A, B, C, D, E))
    trial.clients[A].consent(everyone.to_bytes())
    with pytest.raises(CohortError, match="Only 2 of 5 clients consented, and 3 are needed"):
        trial.clients[A].unmask(consents_to(trial, everyone, (A, B)))
    with pytest.raises(ProtocolError, match="mallory consents, but is no survivor"):
        trial.clients[A].unmask(consents_to(trial, everyone, (A, B, "mallory")))


def test_a_client_unmasks_once() -> None:
    trial = up_to_consent()
    everyone = Survivors((A, B, C, D, E))
    trial.clients[A].consent(everyone.to_bytes())
    consents = consents_to(trial, everyone, (A, B, C))
    trial.clients[A].unmask(consents)
    with pytest.raises(ProtocolError, match=r"asked to unmask, and the next step .* is to join"):
        trial.clients[A].unmask(consents)


@pytest.mark.parametrize(
    ("survivors", "error"),
    [
        ((A, B), CohortError),  # fewer than the threshold
        ((B, C, D), ProtocolError),  # without the one who is asked
        ((A, B, C, "mallory"), ProtocolError),
    ],
)
def test_a_client_does_not_sign_any_set(survivors: tuple[str, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        up_to_consent().clients[A].consent(Survivors(survivors).to_bytes())
