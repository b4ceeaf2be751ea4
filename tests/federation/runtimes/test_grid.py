"""Flower's own apps on the in-process grid: nothing shared, everything counted, in order."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from tightbeam.federation.contract.records import message_bytes
from tightbeam.federation.runtimes.grid import InProcessGrid, run_in_process

client = ClientApp()
server = ServerApp()
results: dict[str, Any] = {}


@client.train()
def _train(message: Message, context: Context) -> Message:
    record = message.content.array_records["arrays"]
    weights = record.pop("w").numpy()  # what it takes out must be there for the next client
    weights = weights + int(context.node_config["partition-id"])
    context.state["seen"] = MetricRecord({"rounds": _rounds(context) + 1})
    metrics = MetricRecord({"num-examples": 1, "rounds": _rounds(context)})
    arrays = ArrayRecord({"w": Array(weights)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@client.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": 1, "rounds": _rounds(context)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _rounds(context: Context) -> int:
    seen = context.state.metric_records.get("seen")
    return int(str(seen["rounds"])) if seen else 0


@server.main()
def _main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3)
    results["found"] = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": Array(np.zeros(5, dtype=np.float32))}),
        num_rounds=int(str(context.run_config["rounds"])),
        train_config=ConfigRecord({"a": 1}),
    )


def _run() -> InProcessGrid:
    grid = InProcessGrid(client, 3, {"rounds": 2})
    run_in_process(grid, server, {"rounds": 2})
    return grid


def test_flowers_own_strategy_runs_and_clients_do_not_touch_each_other() -> None:
    _run()
    found = results["found"]
    assert found.arrays["w"].numpy() == pytest.approx(np.full(5, 2.0))  # mean of 0, 1, 2, twice
    assert found.evaluate_metrics_clientapp[2]["rounds"] == 2  # a client's own state survives


def test_neither_side_reaches_into_what_the_other_keeps() -> None:
    """As over a wire: a message, a reply and a state are copies, whatever is done to the objects."""
    seen: list[RecordDict] = []

    def call(message: Message, context: Context) -> Message:
        own = context.state.config_records.setdefault("own", ConfigRecord({"calls": [0]}))
        reply = Message(RecordDict({"own": own}), reply_to=message)
        seen.append(reply.content)
        message.content.array_records["arrays"].clear()
        message.content = RecordDict()
        return reply

    grid = InProcessGrid(call, 2, {})
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.ones(3))})})
    sent = [Message(content, node, "train") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(sent))
    assert all(list(message.content.array_records["arrays"]) == ["w"] for message in sent)
    replies[0].content.config_records["own"]["calls"] = [1]
    seen[0].config_records["own"]["calls"] = [2]
    (again,) = grid.send_and_receive(sent[:1])
    assert again.content.config_records["own"]["calls"] == [0]
    assert again.metadata.reply_to_message_id == sent[0].metadata.message_id


def test_every_exchange_is_counted_to_the_byte() -> None:
    grid = _run()
    assert [one.message_type for one in grid.exchanges] == (["train"] * 3 + ["evaluate"] * 3) * 2
    assert sorted(one.partition for one in grid.exchanges[:3]) == [0, 1, 2]
    arrays = ArrayRecord({"w": Array(np.zeros(5, dtype=np.float32))})
    assert all(one.down_bytes > arrays.count_bytes() > 5 * 4 for one in grid.exchanges)
    assert all(0 < one.up_bytes < arrays.count_bytes() for one in grid.exchanges[3:6])


def test_the_size_of_a_message_is_that_of_its_protobuf_and_an_empty_list_is_no_trouble() -> None:
    _run()  # messages need a run's identity
    content = RecordDict({"config": ConfigRecord({"empty": [], "text": "abc"})})
    message = Message(content, 2, "train")
    assert message_bytes(message) == len(recorddict_to_proto(content).SerializeToString()) > 0


def test_a_bug_in_a_client_stops_the_simulation_with_its_traceback() -> None:
    broken = ClientApp()

    @broken.train()
    def train(message: Message, context: Context) -> Message:
        raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        run_in_process(InProcessGrid(broken, 3, {"rounds": 1}), server, {"rounds": 1})


def test_listeners_hear_the_start_and_the_end_of_every_exchange() -> None:
    heard: list[tuple[str, int]] = []
    grid = InProcessGrid(
        client,
        3,
        {"rounds": 1},
        lambda partition, kind: heard.append(("start", partition)),
        lambda exchange, reply: heard.append(("end", exchange.partition)),
    )
    run_in_process(grid, server, {"rounds": 1})
    assert [what for what, _ in heard] == ["start", "end"] * 6
