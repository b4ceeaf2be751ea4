"""The sum is exact whoever drops out, or there is none and the error says why."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.secagg_rounds import EXCHANGES, NEVER, Round, identity_of, make_plan, names
from tightbeam.common.errors import CohortError, ProtocolError, TightbeamError
from tightbeam.federation.secagg import Plan, SecAggClient
from tightbeam.federation.secagg.framing import Message, fields
from tightbeam.federation.secagg.messages import (
    Consent,
    Consents,
    Inbox,
    KeyRoll,
    Keys,
    MaskedVector,
    Shares,
    Survivors,
    Unmasking,
)

A, B = names(2)


def outcome(drops: Mapping[str, int], plan: Plan) -> str | None:
    """The exchange at which too few are left, by the definition; None if the round gives a sum."""
    for number, exchange in enumerate(EXCHANGES):
        least = plan.quorum if number < 3 else plan.threshold
        if sum(drops.get(name, NEVER) > number for name in plan.participants) < least:
            return exchange
    return None


@pytest.mark.parametrize("ring_bits", [32, 64])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_everybody_stays(count: int, ring_bits: int) -> None:
    trial = Round(make_plan(count, ring_bits=ring_bits))
    trial.run()
    assert trial.server.survivors == trial.plan.participants
    assert trial.server.dropped == ()
    trial.assert_exact()


def test_the_mean_is_within_the_stated_bound() -> None:
    trial = Round(make_plan(5, ring_bits=32))
    result = trial.run().finish()
    everyone = trial.plan.participants
    exact = np.average(
        [trial.values(n) for n in everyone], axis=0, weights=[trial.weight(n) for n in everyone]
    )
    error = np.abs(result.mean - exact).max()
    assert 0 < error <= trial.plan.encoding.error_bound


@settings(max_examples=60, deadline=None)
@given(
    drops=st.dictionaries(st.sampled_from(names(5)), st.integers(0, 4), max_size=5),
    threshold=st.integers(3, 5),
    min_cohort=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_any_dropout_pattern(drops: dict[str, int], threshold: int, min_cohort: int, seed: int) -> None:
    """Up to the threshold the sum of the survivors is exact; beyond it the round fails by name."""
    plan = make_plan(5, threshold=threshold, min_cohort=min_cohort)
    trial = Round(plan, seed=seed)
    failing = outcome(drops, plan)
    if failing is None:
        trial.run(drops)
        assert set(trial.server.survivors) == {n for n in plan.participants if drops.get(n, NEVER) > 2}
        trial.assert_exact()
    else:
        with pytest.raises(CohortError, match=r"Only \d of 5 clients .* are needed\. Run the round again"):
            trial.run(drops).finish()


@pytest.mark.parametrize("exchange", range(5))
def test_one_dropout_more_than_the_threshold_allows(exchange: int) -> None:
    plan = make_plan(7, threshold=4)
    just_enough = Round(plan)
    just_enough.run(dict.fromkeys(names(7)[:3], exchange))
    just_enough.assert_exact()
    with pytest.raises(CohortError, match=f"Only 3 of 7 clients .*{'returned' if exchange == 4 else 'sent'}"):
        Round(plan).run(dict.fromkeys(names(7)[:4], exchange)).finish()


def test_a_sum_of_fewer_than_the_minimum_cohort_is_never_unmasked() -> None:
    plan = make_plan(5, threshold=3, min_cohort=4)
    trial = Round(plan)
    trial.run({A: 2}, until="unmask")
    trial.assert_exact()
    with pytest.raises(CohortError, match="Only 3 of 5 clients sent masked, and 4 are needed"):
        Round(plan).run({A: 2, B: 2})


def test_clients_survive_a_new_process_before_every_step() -> None:
    trial = Round(make_plan(4))
    fresh = {name: trial.clients[name] for name in trial.clients}
    for number, exchange in enumerate(EXCHANGES):
        messages = trial.server.open() if number == 0 else trial.server.advance()
        for name, message in messages.items():
            state = fresh[name].state()
            fresh[name] = SecAggClient(name, identity_of(name), trial.roster, min_cohort=2).restore(state)
            trial.clients[name] = fresh[name]
            inputs = {name: trial.values(name)}
            trial.server.receive(name, trial.reply(exchange, name, message, inputs))
    trial.assert_exact()
    assert all(client.last_round == 1 for client in fresh.values())


def test_a_client_forgets_its_secrets_when_the_round_ends() -> None:
    trial = Round(make_plan(3))
    trial.run()
    for client in trial.clients.values():
        assert client.state() == fields("client state", (1).to_bytes(8), b"")


KINDS: dict[str, tuple[type[Message], type[Message]]] = {
    "keys": (Plan, Keys),
    "shares": (KeyRoll, Shares),
    "masked": (Inbox, MaskedVector),
    "consent": (Survivors, Consent),
    "unmask": (Consents, Unmasking),
}


def test_a_message_that_has_no_form_cannot_be_made() -> None:
    class Formless(Message):
        kind = "formless"

    with pytest.raises(TypeError, match="abstract method"):
        Formless()  # type: ignore[abstract]  # that is the point


def test_a_client_knows_the_terms_of_the_round_it_is_in() -> None:
    trial = Round(make_plan(3))
    trial.run(until="shares")
    assert trial.clients[A].plan == trial.plan


def recorded() -> Round:
    trial = Round(make_plan(3, size=2))
    trial.run()
    return trial


RECORDED = recorded()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_messages_have_one_form(exchange: str) -> None:
    name = names(3)[0]
    for kind, data in zip(
        KINDS[exchange], (RECORDED.sent[exchange, name], RECORDED.replies[exchange, name]), strict=True
    ):
        assert kind.from_bytes(data).to_bytes() == data
        for other in {kind for kinds in KINDS.values() for kind in kinds} - {kind}:
            with pytest.raises(ProtocolError):
                other.from_bytes(data)


@settings(max_examples=200)
@given(data=st.data(), exchange=st.sampled_from(EXCHANGES), side=st.sampled_from([0, 1]))
def test_no_bytes_get_past_the_parser_by_another_error(data: st.DataObject, exchange: str, side: int) -> None:
    """Cut, flipped or lengthened: a message is refused as such, or it is another well-formed one."""
    kind = KINDS[exchange][side]
    original = (RECORDED.sent, RECORDED.replies)[side][exchange, names(3)[0]]
    at = data.draw(st.integers(0, len(original) - 1))
    altered = data.draw(
        st.sampled_from(
            [original[:at], original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :], original + b"\0"]
        )
    )
    try:
        message = kind.from_bytes(altered)
    except TightbeamError:
        return
    assert message.to_bytes() == altered
