"""Every way to deal loses and doubles nothing; each has the property it is for."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.edge_runs import write_jsonl
from support.federations import TOPICS, sums
from tightbeam.common.errors import DataError
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.simulations.partition import deal
from tightbeam.simulations.shards import client_files, deal_rows

WAYS = ("iid", "size", "dirichlet", "field")
LABELS = [f"topic-{number % 12}" for number in range(600)]


def _deal(by: str, clients: int, *, seed: int = 0, alpha: float = 1.0, skew: float = 1.0) -> list[list[int]]:
    return deal(by, LABELS, clients, alpha=alpha, skew=skew, min_examples=2, seed=seed)


@pytest.mark.parametrize("by", WAYS)
@given(clients=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_every_row_goes_to_exactly_one_client(by: str, clients: int, seed: int) -> None:
    parts = _deal(by, clients, seed=seed, alpha=5.0)
    assert sorted(row for part in parts for row in part) == list(range(len(LABELS)))
    assert len(parts) == clients
    assert min(map(len, parts)) >= 2
    assert parts == _deal(by, clients, seed=seed, alpha=5.0)


def test_iid_sizes_differ_by_one() -> None:
    assert {len(part) for part in _deal("iid", 7)} == {85, 86}


def test_sizes_follow_the_power_law() -> None:
    sizes = [len(part) for part in _deal("size", 5, skew=1.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] / sizes[4] == pytest.approx(5, rel=0.1)
    assert max(len(p) for p in _deal("size", 5, skew=0.0)) == 120


def test_a_topic_has_one_owner() -> None:
    parts = _deal("field", 4)
    owners = [{LABELS[row] for row in part} for part in parts]
    assert [len(own) for own in owners] == [3, 3, 3, 3]
    assert not any(one & other for n, one in enumerate(owners) for other in owners[n + 1 :])


def test_a_small_alpha_makes_clients_unlike_and_a_large_one_alike() -> None:
    def unlikeness(alpha: float) -> float:
        shares = []
        for part in _deal("dirichlet", 6, alpha=alpha):
            counts = Counter(LABELS[row] for row in part)
            shares.append([counts[f"topic-{n}"] / len(part) for n in range(12)])
        return float(np.std(shares, axis=0).mean())

    assert unlikeness(0.1) > 3 * unlikeness(100.0)


@pytest.mark.parametrize(
    ("by", "clients", "said"),
    [
        ("iid", 301, "301 clients with at least 2 examples each need 602; the data has 600"),
        ("field", 13, "12 different values, too few for 13 clients"),
        ("dirichlet", 299, "leaves a client with"),
    ],
)
def test_an_impossible_deal_says_what_is_short(by: str, clients: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        _deal(by, clients, alpha=0.01)


def _scenario(folder: Path, **changes: object) -> Scenario:
    path = write_jsonl(folder / "rows.jsonl", sums(60))
    base = {"clients": 3, "rounds": 1, "data": {"source": str(path)}, "partition": {"by": "field"}}
    return scenario_from_mapping(base | changes)


def test_files_hold_each_row_once_and_nothing_held_out_is_learned(tmp_path: Path) -> None:
    scenario = _scenario(tmp_path)
    train, held_out = client_files(scenario, tmp_path, "client-01")
    learned = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
    tested = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    assert len(learned) == 16
    assert len(tested) == 4
    assert not {row["prompt"] for row in learned} & {row["prompt"] for row in tested}
    assert len({row["topic"] for row in learned + tested}) == 1
    rows = [row for parts in deal_rows(scenario) for part in parts for row in part]
    assert sorted(row["prompt"] for row in rows) == sorted(row["prompt"] for row in sums(60))
    assert {row["topic"] for row in rows} == set(TOPICS)


def test_files_of_another_scenario_are_not_kept(tmp_path: Path) -> None:
    before = client_files(_scenario(tmp_path), tmp_path, "client-00")[0].read_bytes()
    same = client_files(_scenario(tmp_path), tmp_path, "client-00")[0].read_bytes()
    other = client_files(_scenario(tmp_path, seed=4), tmp_path, "client-00")[0].read_bytes()
    assert before == same != other


def test_a_field_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    scenario = _scenario(tmp_path, partition={"by": "field", "field": "subject"})
    with pytest.raises(DataError, match="no key 'subject' to go by; its keys are prompt, completion, topic"):
        deal_rows(scenario)
