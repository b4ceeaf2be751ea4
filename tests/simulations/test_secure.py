"""Secure rounds over Flower's messages: the same adapter as in the open, and no client's own anywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from support.clouds import CloudProcess
from support.federations import Playground
from tightbeam.common.authority import init_certificates
from tightbeam.common.errors import FederationError, UsageError
from tightbeam.simulations.apps.client_app import app
from tightbeam.simulations.scenario import Scenario


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identities") / "certs"
    init_certificates(folder, clients=[f"client-{number:02d}" for number in range(5)])
    return folder


@pytest.fixture(scope="module")
def tls_cloud(backbone: Path, certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tls-cloud")
    with CloudProcess(backbone, folder, "--identity", str(certs / "cloud")) as cloud:
        yield cloud


@pytest.fixture
def signed(tls_cloud: CloudProcess, certs: Path, backbone: Path, tmp_path: Path) -> "Signed":
    return Signed(Playground(tls_cloud.address, tmp_path, backbone), certs)


class Signed:
    """Federations whose clients have identities."""

    def __init__(self, playground: Playground, certs: Path) -> None:
        self.playground, self._certs = playground, certs

    def run(self, **changes: Any) -> Scenario:
        cloud = {"insecure": False, "identities": str(self._certs)}
        scenario = self.playground.scenario(**{"clients": 4, **changes}, cloud=cloud)
        self.playground.run(scenario)
        return scenario


@pytest.mark.parametrize("name", ["fedit", "ffa"])
def test_the_sum_through_the_masks_is_the_mean_in_the_open(signed: Signed, name: str) -> None:
    train = {"lr": 2e-2, "steps": 3}
    in_the_open = signed.run(strategy={"name": name}, train=train)
    masked = signed.run(strategy={"name": name, "secure": True}, train=train)
    left, right = signed.playground.state(in_the_open), signed.playground.state(masked)
    assert left.keys() == right.keys()
    moved = signed.playground.state(in_the_open, 1)
    assert any(not np.array_equal(moved[n], left[n]) for n in left)
    for tensor, array in left.items():
        np.testing.assert_allclose(right[tensor], array, rtol=1e-4, atol=1e-7)
    row = signed.playground.rows(masked, "round")[0]
    assert row["relative_error"] is None
    assert row["notes"][0].startswith("secure: ")


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


def test_no_message_holds_a_clients_adapter(signed: Signed, certs: Path) -> None:
    """What travels is the masked vector: as bytes it does not compress, and no array comes back."""
    import zlib

    replies: list[Message] = []

    def watch(message: Message, context: Context) -> Message:
        reply = app(message, context)
        replies.append(reply)
        return reply

    cloud = {"insecure": False, "identities": str(certs)}
    scenario = signed.playground.scenario(rounds=1, clients=3, strategy={"secure": True}, cloud=cloud)
    from rich.console import Console

    from tightbeam.simulations.experiment import run_apps

    run_apps(scenario, signed.playground.address, certs, console=Console(quiet=True), client_app=watch)
    assert not any(reply.content.array_records for reply in replies)
    vectors = [
        data
        for reply in replies
        if "metrics" in reply.content.metric_records
        and isinstance(data := reply.content.config_records["notes"].get("secure"), bytes)
    ]
    assert len(vectors) == 3
    assert all(len(zlib.compress(vector)) > 0.99 * len(vector) for vector in vectors)
    rows = signed.playground.rows(scenario, "client_round")
    assert [row["adapter_up_bytes"] for row in rows] == [len(vector) for vector in vectors]


def test_who_cannot_sign_or_hide_is_told(playground: Playground, signed: Signed) -> None:
    with pytest.raises(UsageError, match=r"strategy\.secure needs identities"):
        playground.run(playground.scenario(strategy={"secure": True}))
    signed.playground.scenario()  # the next name
    with pytest.raises(FederationError, match="needs 3 clients or more, not 2"):
        signed.run(sample=2, strategy={"secure": True})
