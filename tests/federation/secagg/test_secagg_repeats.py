"""A model asked again without one client: what the two sums would show, and that there is no second.

Clients are made anew for each round, as after a restart: what they remember is in their folders.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.secagg_rounds import Round, make_plan, names
from tightbeam.common.errors import CohortError, IntegrityError
from tightbeam.federation.client.answered import AnsweredFolder
from tightbeam.federation.secagg import Answered

A, B, C, D, E = names(5)
MODEL = hashlib.sha256(b"adapter").digest()
Memory = Callable[[str], Answered]


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return lambda name: AnsweredFolder(tmp_path / name)


def asked(memory: Memory, number: int, cohort: list[str], **changes: Any) -> Round:
    """A round as a server proposes it, over other clients and under another number."""
    plan = make_plan(len(cohort), round=number, participants=tuple(cohort), min_cohort=3, **changes)
    return Round(plan, seed=number, min_cohort=3, answered=memory)


def without_the_victim(memory: Memory, **changes: Any) -> Round:
    second = asked(memory, 2, [A, B, C, D], **changes)
    second.run()
    return second


def with_the_victim_cut_off(memory: Memory) -> Round:
    """It is asked as well, and its vector does not arrive."""
    second = asked(memory, 2, [A, B, C, D, E])
    second.run({E: 2})
    return second


@pytest.mark.parametrize("attack", [without_the_victim, with_the_victim_cut_off])
def test_two_sums_of_one_model_would_show_the_client_between_them(
    memory: Memory, attack: Callable[[Memory], Round]
) -> None:
    def forgetful(name: str) -> Answered:
        return {}

    first = asked(forgetful, 1, [A, B, C, D, E])
    whole, rest = first.run().finish(), attack(forgetful).server.finish()
    assert whole.weight - rest.weight == first.weight(E), "even what it counts by"
    shown = (whole.total - rest.total) / first.weight(E)
    np.testing.assert_allclose(shown, first.values(E), atol=first.plan.encoding.error_bound)

    asked(memory, 1, [A, B, C, D, E]).run()
    with pytest.raises(CohortError, match=f"answered this model for a cohort that differs by {E}"):
        attack(memory)


@pytest.mark.parametrize(
    "changes",
    [{"federation": "another"}, {"terms_sha256": hashlib.sha256(b"other terms").digest()}, {"threshold": 4}],
)
def test_another_name_for_the_round_changes_nothing(memory: Memory, changes: dict[str, Any]) -> None:
    asked(memory, 1, [A, B, C, D, E]).run()
    with pytest.raises(CohortError, match=f"differs by {E}"):
        without_the_victim(memory, **changes)


def test_the_same_clients_may_be_asked_again_and_the_sum_is_no_news(memory: Memory) -> None:
    """As after a kill: the round that was cut off is done once more."""
    one, other = (asked(memory, number, [A, B, C, D]).run().finish() for number in (1, 2))
    np.testing.assert_array_equal(one.total, other.total)


def test_another_model_and_other_clients_are_answered(memory: Memory) -> None:
    asked(memory, 1, [A, B, C]).run()
    asked(memory, 2, [A, B, C, D], model_sha256=hashlib.sha256(b"the next").digest()).run()
    asked(memory, 3, [D, E, "client-005"]).run()


def test_a_round_that_was_never_unmasked_does_not_count(memory: Memory) -> None:
    """Too few vectors came: the next round starts from the same model, with whoever is there."""
    asked(memory, 1, [A, B, C, D, E]).run(until="masked")
    asked(memory, 2, [A, B, C, D]).run()


def test_whatever_a_server_asks_the_sums_of_a_model_are_of_the_same_clients_or_of_none_in_common(
    memory: Memory,
) -> None:
    """So no adding and subtracting of sums is about fewer clients than a cohort has."""
    rng, everyone, cohorts = np.random.default_rng(0), names(9), list[frozenset[str]]()
    for number in range(60):
        cohort = sorted(rng.choice(everyone, size=rng.integers(3, 5), replace=False))
        try:
            asked(memory, number, cohort, size=2).run()
        except CohortError:
            continue
        cohorts.append(frozenset(cohort))
    assert len(set(cohorts)) >= 2
    for one in cohorts:
        for other in cohorts:
            assert one == other or not one & other


def test_a_record_cut_short_is_named_and_nothing_is_signed_beside_it(tmp_path: Path, memory: Memory) -> None:
    (tmp_path / B).mkdir()
    (tmp_path / B / f"{MODEL.hex()}.json").write_text('["client-0', encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"json is cut short.*Remove the file"):
        asked(memory, 1, [A, B, C]).run()


def test_of_two_processes_of_a_client_one_decides(tmp_path: Path) -> None:
    cohorts = [tuple(sorted({A, B, C, D, E} - {one})) for one in (A, B, C, D, E)]
    with ThreadPoolExecutor(5) as pool:
        for number in range(20):
            model = hashlib.sha256(bytes([number])).digest()
            answers = list(pool.map(lambda c: _claim(tmp_path, model, c), cohorts))  # noqa: B023
            kept = AnsweredFolder(tmp_path).get(model)
            assert set(answers) <= {kept, None}
            assert kept in answers


def _claim(folder: Path, model: bytes, cohort: tuple[str, ...]) -> tuple[str, ...] | None:
    try:
        return AnsweredFolder(folder).setdefault(model, cohort)
    except IntegrityError:  # met the other one while it wrote
        return None
