"""Secure rounds over Flower's messages: the same adapter as in the open, and no client's own anywhere."""

import io
import zlib
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from rich.console import Console

from support.federations import Playground, Signed
from tightbeam.common.errors import FederationError, UsageError
from tightbeam.federation.contract.terms import CLIP
from tightbeam.federation.runtimes.grid import InProcessGrid
from tightbeam.federation.secagg import FixedPoint
from tightbeam.simulations.client_app import app
from tightbeam.simulations.experiment import run_apps

SCALE = 2.0  # the state's B holds it


@pytest.mark.parametrize("name", ["fedit", "ffa", "fedavgm", pytest.param("fedadam", marks=pytest.mark.slow)])
def test_the_sum_through_the_masks_is_the_mean_in_the_open(signed: Signed, name: str) -> None:
    """The adapter, the losses of training and evaluation, and what the server's optimizer made of them."""
    train = {"lr": 2e-2, "steps": 3}
    section = {"name": name, "server_lr": 0.01 if name == "fedadam" else 1.0}
    in_the_open = signed.run(strategy=section, train=train)
    masked = signed.run(strategy={**section, "secure": True}, train=train)
    left, right = signed.playground.state(in_the_open), signed.playground.state(masked)
    assert left.keys() == right.keys()
    moved = signed.playground.state(in_the_open, 1)
    assert any(not np.array_equal(moved[n], left[n]) for n in left)
    # Adam divides by the root of small squares: what rounding changed in them, it makes larger.
    tolerance = 2e-4 if name == "fedadam" else 1e-7
    if name in (
        "fedit",
        "ffa",
    ):  # no optimizer at the server, so a first round is within the encoding's bound
        bound = FixedPoint.fitting(CLIP, 2**20, 4).error_bound
        one, other = (signed.playground.state(scenario, 1) for scenario in (in_the_open, masked))
        for tensor, array in one.items():
            np.testing.assert_allclose(other[tensor], array, rtol=0, atol=SCALE * bound)
    for tensor, array in left.items():
        np.testing.assert_allclose(right[tensor], array, rtol=1e-4, atol=tolerance)
    for kind in ("round", "evaluation"):
        rows = [signed.playground.rows(scenario, kind) for scenario in (in_the_open, masked)]
        assert len(rows[0]) == len(rows[1]) == 2
        for one, other in zip(*rows, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    row = signed.playground.rows(masked, "round")[0]
    assert row["relative_error"] is None
    assert row["secure_bytes"] > 0


def test_what_is_not_shared_is_in_no_sum(signed: Signed) -> None:
    """Personal bottoms stay at the clients, and the mean of the tops is that in the open."""
    changes: dict[str, Any] = {"client": {"share": "top"}, "train": {"lr": 2e-2}, "rounds": 1}
    in_the_open, masked = signed.run(**changes), signed.run(**changes, strategy={"secure": True})
    left, right = signed.playground.state(in_the_open), signed.playground.state(masked)
    assert left.keys() == right.keys()
    assert {name.split(".layers.")[1].split(".")[0] for name in left} == {"5"}
    for tensor, array in left.items():
        np.testing.assert_allclose(right[tensor], array, rtol=1e-4, atol=1e-7)


def test_a_frozen_bottom_is_in_no_sum_any_more(signed: Signed) -> None:
    changes: dict[str, Any] = {"train": {"lr": 2e-2, "freeze_bottom_after": 1}, "rounds": 3}
    in_the_open, masked = signed.run(**changes), signed.run(**changes, strategy={"secure": True})
    left, right = signed.playground.state(in_the_open), signed.playground.state(masked)
    before = signed.playground.state(masked, 2)
    for tensor, array in left.items():
        np.testing.assert_allclose(right[tensor], array, rtol=1e-4, atol=1e-7)
        assert np.array_equal(right[tensor], before[tensor]) == (".layers.0." in tensor), tensor
    up = [row["adapter_up_bytes"] for row in signed.playground.rows(masked, "client_round")]
    assert max(up[4:]) < 0.6 * min(up[:4]), "the vectors are those of the top alone"


def test_a_client_that_vanishes_does_not_spoil_the_sum(signed: Signed) -> None:
    changes: dict[str, Any] = {"clients": 5, "rounds": 3, "faults": {"dropout": 0.2}}
    in_the_open, masked = signed.run(**changes), signed.run(**changes, strategy={"secure": True})
    statuses = [row["status"] for row in signed.playground.rows(masked, "client_round")]
    assert "dropped" in statuses
    assert statuses == [row["status"] for row in signed.playground.rows(in_the_open, "client_round")]
    left, right = signed.playground.state(in_the_open), signed.playground.state(masked)
    for tensor, array in left.items():
        np.testing.assert_allclose(right[tensor], array, rtol=1e-3, atol=1e-6)


def test_too_few_survivors_are_no_sum_and_the_round_says_so(signed: Signed) -> None:
    scenario = signed.run(rounds=1, faults={"dropout": 0.6}, strategy={"secure": True})
    dropped = [row for row in signed.playground.rows(scenario, "client_round") if row["status"] == "dropped"]
    assert len(dropped) >= 2
    (row,) = signed.playground.rows(scenario, "round")
    before, after = signed.playground.state(scenario, 0), signed.playground.state(scenario, 1)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert row["loss"] is None


def test_of_a_client_the_server_gets_a_masked_vector_and_costs(signed: Signed) -> None:
    """No array, no loss, no number of examples in any message; the vectors do not compress."""
    replies: list[Message] = []

    def watch(message: Message, context: Context) -> Message:
        reply = app(message, context)
        replies.append(reply)
        return reply

    scenario = signed.scenario(rounds=1, clients=3, strategy={"secure": True})
    quiet = Console(quiet=True)
    run_apps(scenario, signed.playground.address, signed.certs, console=quiet, client_app=watch)
    assert not any(reply.content.array_records for reply in replies)
    told = {
        name for reply in replies for metrics in reply.content.metric_records.values() for name in metrics
    }
    assert "wire-up-bytes" in told
    assert not told & {"loss", "weight", "examples", "learned-tokens"}
    rows = signed.playground.rows(scenario, "client_round")
    for row in (*rows, *signed.playground.rows(scenario, "client_eval")):
        assert not row.keys() & {"loss", "weight", "examples", "learned_tokens"}
    work = [reply for reply in replies if reply.content.metric_records]
    vectors = [reply.content.config_records["notes"]["secure"] for reply in work]
    sizes = [len(vector) for vector in vectors if isinstance(vector, bytes)]
    assert len(sizes) == 9, "an evaluation before and after, and a round"
    assert [row["adapter_up_bytes"] for row in rows] == sizes[3:6]
    for vector in vectors[3:6]:
        assert isinstance(vector, bytes)
        assert len(zlib.compress(vector)) > 0.99 * len(vector)


def test_the_report_of_a_secure_run_has_means_and_no_clients_loss(signed: Signed) -> None:
    scenario = signed.run(rounds=1, strategy={"secure": True})
    report = signed.playground.report(scenario)
    assert report["secure"] is True
    assert {client["last_loss"] for client in report["clients"]} == {None}
    assert [one["worst"] for one in report["evaluations"]] == [None, None]
    assert report["rounds"][0]["loss"] > 0
    assert report["total"]["tokens"] > 0
    page = (scenario.folder / "report.html").read_text(encoding="utf-8")
    assert "sums of adapters and losses" in page
    assert "Worst client" not in page


def test_a_client_that_joins_later_is_in_the_next_sum(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, everybody = iter(range(10**6)), InProcessGrid.get_node_ids

    def get_node_ids(self: InProcessGrid) -> list[int]:
        ids = list(everybody(self))
        return ids if next(looks) >= 2 else ids[:-1]

    monkeypatch.setattr(InProcessGrid, "get_node_ids", get_node_ids)
    scenario = signed.run(rounds=2, wait_for=3, strategy={"secure": True})
    assert [row["updates"] for row in signed.playground.rows(scenario, "round")] == [3, 4]


def test_who_is_left_and_too_few_to_hide_is_not_evaluated_and_it_is_said(signed: Signed) -> None:
    """Evaluations are sums as well: with two clients, each would know the other's loss."""

    def two_fail(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] != 1:
            notes = ConfigRecord({"client": "any", "status": "failed", "reason": "Its disk is full."})
            reply.content = RecordDict({"notes": notes})
        return reply

    scenario = signed.scenario(rounds=1, clients=3, strategy={"secure": True})
    text = io.StringIO()
    console = Console(file=text, width=300)
    run_apps(scenario, signed.playground.address, signed.certs, console=console, client_app=two_fail)
    assert not signed.playground.rows(scenario, "evaluation")
    assert len(signed.playground.rows(scenario, "no_evaluation")) == 2
    assert "round 1: no evaluation: Only 1 of 3 clients sent masked, and 3 are needed." in text.getvalue()
    assert "Its disk is full." in text.getvalue()


def test_who_cannot_sign_or_hide_is_told(playground: Playground, signed: Signed) -> None:
    with pytest.raises(UsageError, match=r"strategy\.secure needs identities"):
        playground.run(playground.scenario(strategy={"secure": True}))
    signed.playground.scenario()  # the next name
    with pytest.raises(FederationError, match="needs 3 clients or more, not 2"):
        signed.run(sample=2, strategy={"secure": True})
