"""A server that has the others compute something else reads one client's update from the sum; here it cannot.

Each attack runs against clients that do not check, too: there it gives the victim's update.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from rich.console import Console

from support.federations import Signed
from support.secure_nodes import SecureNodes, adapter, secure_scenario
from tightbeam.common.errors import CohortError
from tightbeam.federation.client import secure
from tightbeam.federation.contract.records import from_record, to_record
from tightbeam.federation.runtimes.grid import ClientCall
from tightbeam.federation.server.secure import SecureRounds, SecureSum
from tightbeam.simulations.client_app import app
from tightbeam.simulations.experiment import run_apps

VICTIM = 1
NAMES = [f"client-{number:02d}" for number in range(5)]
Arrays = dict[str, NDArray[Any]]
Change = Callable[[Message, Context], None]


def treating_others(change: Change, inner: ClientCall = app) -> ClientCall:
    """A server that sends the victim what all agreed on, and changes what the others work with."""

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] != VICTIM:
            change(message, context)
        return inner(message, context)

    return call


# -------------------------------------------------------------------- with real training, over a real cloud


def fold_away(message: Message, context: Context) -> None:
    """Weights so large that no gradient reaches the adapter."""
    arrays = from_record(message.content.array_records["arrays"])
    rng = np.random.default_rng(0)
    huge = {
        name: 1e6 * rng.normal(size=(1, array.shape[1]) if ".lora_A." in name else (array.shape[0], 1))
        for name, array in arrays.items()
    }
    message.content.array_records["fold"] = to_record({n: a.astype(np.float32) for n, a in huge.items()})


def learn_nothing(message: Message, context: Context) -> None:
    scenario = json.loads(str(context.run_config["scenario"]))
    scenario["train"]["lr"] = 1e-30
    context.run_config["scenario"] = json.dumps(scenario)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[SecureSum]:
    """Every sum that the server learns."""
    found, close = list[SecureSum](), SecureRounds.close

    def closed(self: SecureRounds, masked: dict[str, bytes]) -> SecureSum:
        found.append(close(self, masked))
        return found[-1]

    monkeypatch.setattr(SecureRounds, "close", closed)
    return found


def attacked(signed: Signed, change: Change) -> tuple[Arrays, Arrays, list[str]]:
    """Run the attack beside an open run: where the victim started, what it really learned, who said what."""
    seen: dict[str, Arrays] = {}

    def watch(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == VICTIM:
            seen["start"] = from_record(message.content.array_records["arrays"])
            seen["end"] = from_record(reply.content.array_records["arrays"])
        return reply

    for client, section in ((watch, {}), (treating_others(change), {"secure": True})):
        strategy = {"weight": "equal", **section}
        scenario = signed.scenario(clients=3, rounds=1, strategy=strategy, train={"optimizer": "sgd"})
        quiet = Console(quiet=True)
        run_apps(scenario, signed.playground.address, signed.certs, console=quiet, client_app=client)
    rows = signed.playground.rows(scenario, "client_round")
    return seen["start"], seen["end"], [row["reason"] for row in rows]


def learned_of_victim(found: SecureSum, start: Arrays) -> NDArray[Any]:
    """What is left of the sum when the others stayed where they were."""
    moved = [found.weight * (found.mean[name] - start[name]) for name in sorted(start)]
    return np.concatenate([one.ravel() for one in moved])


@pytest.mark.parametrize(
    ("change", "said"),
    [(fold_away, "got 'fold' in a secure round"), (learn_nothing, "got another scenario or backbone")],
)
@pytest.mark.parametrize("checks", [True, False])
def test_the_update_of_one_client_is_not_read_from_the_sum(
    signed: Signed,
    sums: list[SecureSum],
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    said: str,
    checks: bool,
) -> None:
    if not checks:
        monkeypatch.setattr(secure, "require_agreed", lambda *asked: None)
    start, end, reasons = attacked(signed, change)
    trained = [one for one in sums if one.mean]
    if checks:
        assert trained == []
        assert [said in reason for reason in reasons] == [True, False, True]
        return
    truth = np.concatenate([(end[name] - start[name]).ravel() for name in sorted(start)])
    found = learned_of_victim(trained[0], start)
    assert np.linalg.norm(found - truth) < 1e-4 * np.linalg.norm(truth)


# ------------------------------------------------------------ every way to ask for something else, in memory


def other_shape(message: Message, context: Context) -> None:
    """The same bytes under the same name."""
    arrays = from_record(message.content.array_records["arrays"])
    message.content["arrays"] = to_record(
        {name: array.reshape(array.T.shape) for name, array in arrays.items()}
    )


def other_type(message: Message, context: Context) -> None:
    arrays = from_record(message.content.array_records["arrays"])
    message.content["arrays"] = to_record({name: array.view(np.int32) for name, array in arrays.items()})


def other_arrays(message: Message, context: Context) -> None:
    message.content["arrays"] = to_record(adapter(5))


def one_array_fewer(message: Message, context: Context) -> None:
    message.content.array_records["arrays"].popitem()


def other_round(message: Message, context: Context) -> None:
    message.content.config_records["config"]["server-round"] = 2


def a_fold(message: Message, context: Context) -> None:
    message.content["fold"] = to_record(adapter(5))


def a_norm(message: Message, context: Context) -> None:
    message.content.config_records["config"]["clipping_norm"] = 1e-30


def figures(message: Message, context: Context) -> None:
    message.content["metrics"] = MetricRecord({"loss": 1.0})


def a_record(message: Message, context: Context) -> None:
    message.content["more"] = ConfigRecord()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_arrays, "another adapter to start from"),
        (one_array_fewer, "another adapter to start from"),
        (other_shape, "another adapter to start from"),
        (other_type, "another adapter to start from"),
        (other_round, "another round or kind of work"),
        (a_fold, "got 'fold' in a secure round"),
        (a_norm, "got 'clipping_norm' in a secure round"),
        (figures, "got 'metrics' in a secure round"),
        (a_record, "got 'more' in a secure round"),
    ],
)
def test_whoever_is_asked_for_something_else_masks_nothing(
    certs: Path, tmp_path: Path, change: Change, said: str
) -> None:
    nodes = SecureNodes(secure_scenario(5), certs, tmp_path)
    nodes.grid._app = treating_others(change, nodes)
    replies = nodes.work()
    assert list(nodes.vectors(replies)) == [NAMES[VICTIM]]
    for name in NAMES[:VICTIM] + NAMES[VICTIM + 1 :]:
        assert said in str(replies[name].content.config_records["notes"]["reason"])
    with pytest.raises(CohortError, match="Only 1 of 5 clients sent masked"):
        nodes.server.close(nodes.vectors(replies))


def test_an_evaluation_is_not_taken_for_training(certs: Path, tmp_path: Path) -> None:
    nodes = SecureNodes(secure_scenario(5), certs, tmp_path)
    replies = nodes.work(kind="evaluate")
    assert nodes.vectors(replies) == {}
    assert "another round or kind of work" in str(replies[NAMES[0]].content.config_records["notes"]["reason"])


def test_another_backbone_is_not_in_the_plan(certs: Path, tmp_path: Path) -> None:
    nodes = SecureNodes(secure_scenario(5), certs, tmp_path)
    nodes.backbone = "another"
    assert nodes.vectors(replies := nodes.work()) == {}
    assert "another scenario or backbone" in str(replies[NAMES[0]].content.config_records["notes"]["reason"])


def test_a_node_with_the_identity_of_another_client_is_told_so(certs: Path, tmp_path: Path) -> None:
    nodes = SecureNodes(secure_scenario(5), certs, tmp_path)
    context = nodes.grid._contexts[nodes.ids[NAMES[0]]]
    context.node_config["identity"] = str(certs / NAMES[2])
    nodes.work()
    assert "client-00 has the identity of client-02" in nodes.opened.failures[NAMES[0]]


def test_work_without_a_round_is_refused(certs: Path, tmp_path: Path) -> None:
    """No plan, no keys: else the vector would go out under no mask that anybody agreed on."""
    nodes = SecureNodes(secure_scenario(5), certs, tmp_path)
    content = RecordDict({"arrays": to_record(nodes.start), "config": ConfigRecord({"server-round": 1})})
    (reply,) = nodes.grid.send_and_receive([Message(content, nodes.ids[NAMES[0]], "train")])
    reason = str(reply.content.config_records["notes"]["reason"])
    assert reason == "client-00 was asked for work outside of a secure round."
