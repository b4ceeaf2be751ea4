"""The server's side of a round with made-up replies: whom it asks, what it believes, what it writes down."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from support.federations import figures
from tightbeam.common.errors import CohortError, DataError
from tightbeam.federation.contract.layers import layers_of
from tightbeam.federation.contract.records import from_record, to_record
from tightbeam.federation.runtimes.grid import InProcessGrid
from tightbeam.federation.scenario import scenario_from_mapping
from tightbeam.federation.server.global_adapter import GlobalAdapter
from tightbeam.federation.server.journal import Journal
from tightbeam.federation.server.replies import Node, failure_of
from tightbeam.federation.server.strategy import FederatedLora

SHAPES = {"m.layers.5.q.lora_A.weight": (2, 6), "m.layers.5.q.lora_B.weight": (5, 2)}
LAYERS = layers_of(SHAPES, "test")


def _nobody(message: Message, context: Context) -> Message:
    raise AssertionError("replies are made up here")


class Server:
    """A strategy with nodes that are not there, and a start that all get."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        section = {"clients": 4, "rounds": 2, "client": {"r": 2}, **changes}
        self.scenario = scenario_from_mapping(section)
        self.grid = InProcessGrid(_nobody, 4, {})
        self.journal = Journal(folder, self.scenario)
        self.journal.begin(resume=False)
        ids = self.grid.get_node_ids()
        nodes = [
            Node(node_id, profile, b"", LAYERS, frozenset())
            for node_id, profile in zip(ids, self.scenario.profiles(), strict=True)
        ]
        self.strategy = FederatedLora(self.scenario, nodes, self.journal)
        self.arrays = to_record(GlobalAdapter.initial([LAYERS], 2, 0).arrays())

    def ask(self, number: int = 1) -> list[Message]:
        messages = self.strategy.configure_train(number, self.arrays, ConfigRecord(), self.grid)
        messages = list(messages)
        for position, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"message-{number}-{position}"
        return messages

    @staticmethod
    def reply(message: Message, change: float = 1.0, **metrics: float) -> Message:
        """What a sound client would hand in: every value moved by `change`."""
        start = from_record(message.content.array_records["arrays"])
        arrays = {name: array + np.float32(change) for name, array in start.items()}
        if (weight := metrics.get("weight")) is not None:
            trains = message.metadata.message_type == "train"
            own = {"examples": weight} if trains else {"tokens": weight, "learned-tokens": weight}
            metrics = {**own, **metrics}
        content = RecordDict({"arrays": to_record(arrays), "metrics": figures(message, **metrics)})
        content["notes"] = ConfigRecord({"client": "x", "status": "ok", "run": "r"})
        return Message(content, reply_to=message)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.journal.rows if row["row"] == kind]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def test_samples_follow_the_seed_and_the_round(tmp_path: Path) -> None:
    def asked(seed: int, folder: str, number: int) -> list[int]:
        server = Server(tmp_path / folder, sample=2, seed=seed)
        return [message.metadata.dst_node_id for message in server.ask(number)]

    one = [asked(0, f"a{number}", number) for number in range(1, 7)]
    assert one == [asked(0, f"b{number}", number) for number in range(1, 7)]
    assert one != [asked(1, f"c{number}", number) for number in range(1, 7)]
    assert all(len(set(pair)) == 2 and pair == sorted(pair) for pair in one)
    assert len(set(map(tuple, one))) > 1


def test_each_client_gets_its_layers_and_what_it_has_spent(server: Server) -> None:
    server.journal.append(
        "client_round", round=1, client="client-01", status="ok", wire_up_bytes=3_000_000, weight_bytes=10
    )
    by_id = {message.metadata.dst_node_id: message for message in server.ask(2)}
    contents = [by_id[node_id].content for node_id in sorted(by_id)]
    assert all(set(content.array_records["arrays"]) == set(SHAPES) for content in contents)
    configs = [content.config_records["config"] for content in contents]
    assert [config["spent-mb"] for config in configs] == pytest.approx([0, 3.00001, 0, 0])
    assert [config["first"] for config in configs] == [True, False, True, True]
    assert all(config["server-round"] == 2 for config in configs)


def test_the_mean_and_the_loss_are_weighted(server: Server) -> None:
    messages = server.ask()
    replies = [
        server.reply(m, change, weight=w, loss=loss)
        for m, change, w, loss in zip(messages, (1, 2, 3, 4), (1, 1, 1, 5), (1.0, 2.0, 3.0, 4.0), strict=True)
    ]
    arrays, metrics = server.strategy.aggregate_train(1, reversed(replies))
    assert arrays is not None
    assert metrics is not None
    assert metrics["loss"] == pytest.approx((1 + 2 + 3 + 5 * 4) / 8)
    name = "m.layers.5.q.lora_A.weight"
    moved = (
        from_record(arrays)["learned/" + name]
        - from_record(messages[0].content.array_records["arrays"])[name]
    )
    np.testing.assert_allclose(moved, (1 + 2 + 3 + 5 * 4) / 8, rtol=1e-5)
    assert [row["client"] for row in server.rows("client_round")] == [f"client-0{n}" for n in range(4)]


def test_an_error_of_flowers_own_is_a_failure_with_its_text(server: Server) -> None:
    first, second, *others = server.ask()
    replies = [Message(Error(code=0, reason="The node ran out of memory."), reply_to=first)]
    replies += [Message(Error(code=7), reply_to=second), *map(server.reply, others)]
    server.strategy.aggregate_train(1, replies)
    rows = server.rows("client_round")
    assert [row["status"] for row in rows] == ["failed", "failed", "ok", "ok"]
    assert rows[0]["reason"] == "The node ran out of memory."
    assert "Flower's error 7" in rows[1]["reason"]
    assert server.rows("round")[0]["updates"] == 2


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: a | {"m.layers.5.q.lora_A.weight": a["m.layers.5.q.lora_A.weight"] * np.nan}, "NaN"),
        (lambda a: {n: array for n, array in a.items() if "lora_A" in n}, "lora_"),
        (lambda a: {n.replace(".5.", ".6."): array for n, array in a.items()}, "layers.5.q is missing"),
        (
            lambda a: {n: np.zeros((3, 6) if "lora_A" in n else (5, 3), np.float32) for n in a},
            "rank 3, not 2",
        ),
    ],
    ids=["nan", "half", "other layer", "other rank"],
)
def test_what_does_not_fit_is_refused_by_name(server: Server, spoil: Any, said: str) -> None:
    messages = server.ask()
    replies = list(map(server.reply, messages))
    arrays = from_record(replies[2].content.array_records["arrays"])
    replies[2].content.array_records["arrays"] = to_record(spoil(arrays))
    server.strategy.aggregate_train(1, replies)
    row = server.rows("client_round")[2]
    assert row["status"] == "refused"
    assert "client-02" in row["reason"]
    assert said in row["reason"]
    assert server.rows("round")[0]["updates"] == 3


def test_a_weight_of_nothing_is_refused(server: Server) -> None:
    messages = server.ask()
    replies = [server.reply(m, weight=0 if number == 1 else 1) for number, m in enumerate(messages)]
    server.strategy.aggregate_train(1, replies)
    assert "its weight is 0" in server.rows("client_round")[1]["reason"]


def test_who_is_late_is_accounted_and_left_out(tmp_path: Path) -> None:
    server = Server(tmp_path, faults={"deadline_s": 5})
    messages = server.ask()
    replies = [server.reply(m, **{"virtual-s": took}) for m, took in zip(messages, (1, 6, 2, 3), strict=True)]
    server.strategy.aggregate_train(1, replies)
    assert [row["status"] for row in server.rows("client_round")] == ["ok", "late", "ok", "ok"]
    assert server.rows("round")[0]["virtual_s"] == 5


def test_all_failed_is_the_first_ones_error_and_all_gone_is_no_update(tmp_path: Path) -> None:
    failing, leaving = Server(tmp_path / "a"), Server(tmp_path / "b")
    replies = [
        Message(Error(code=0, reason=f"No disk {n}."), reply_to=m) for n, m in enumerate(failing.ask())
    ]
    with pytest.raises(CohortError, match=r"client-00 says: No disk 0\."):
        failing.strategy.aggregate_train(1, replies)
    gone = []
    for message in leaving.ask():
        notes = ConfigRecord({"client": "x", "status": "left", "reason": "Its budget is spent."})
        gone.append(Message(RecordDict({"notes": notes}), reply_to=message))
    assert leaving.strategy.aggregate_train(1, gone) == (None, None)
    assert leaving.rows("round")[0]["notes"] == ["no update"]
    assert leaving.strategy.present() == []
    assert leaving.ask(2) == []


def test_a_newcomer_takes_the_place_of_the_node_that_it_was(server: Server) -> None:
    node = server.strategy.present()[1]
    server.strategy.admit([Node(99, node.profile, b"", LAYERS, frozenset())])
    assert sorted(message.metadata.dst_node_id for message in server.ask()) == [2, 4, 5, 99]


def test_evaluations_are_asked_at_both_ends_and_as_often_as_the_scenario_says(tmp_path: Path) -> None:
    server = Server(tmp_path, rounds=5, eval_every=2)
    asked = [
        number
        for number in range(6)
        if list(server.strategy.configure_evaluate(number, server.arrays, ConfigRecord(), server.grid))
    ]
    assert asked == [0, 2, 4, 5]


def test_the_spread_of_an_evaluation(server: Server) -> None:
    messages = list(server.strategy.configure_evaluate(0, server.arrays, ConfigRecord(), server.grid))
    for position, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = f"message-{position}"
    losses, weights = (1.0, 4.0, 2.0, 3.0), (1, 1, 1, 7)
    replies = [server.reply(m, loss=x, weight=w) for m, x, w in zip(messages, losses, weights, strict=True)]
    found = server.strategy.aggregate_evaluate(0, replies)
    assert found is not None
    assert dict(found) == {"clients": 4, "loss": 2.8, "worst": 4.0, "median": 3.0, "best": 1.0}
    assert server.strategy.aggregate_evaluate(0, []) is None


def test_a_failure_keeps_its_kind_across_the_wire(server: Server) -> None:
    message = server.ask()[0]
    notes = {"client": "x", "status": "failed", "reason": "a.jsonl, line 3: no prompt.", "code": "data"}
    error = failure_of(Message(RecordDict({"notes": ConfigRecord(dict(notes))}), reply_to=message))
    assert isinstance(error, DataError)
    assert str(error) == "a.jsonl, line 3: no prompt."
    assert failure_of(server.reply(message)) is None
