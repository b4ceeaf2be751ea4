"""Flower's grid in one process: the same apps as on a SuperLink, without Ray, sockets or waiting.

Clients run one after the other, so a run is a function of its seed. Every message and every client's state
go through Flower's own protobufs, as on a wire: for the exact size, and so that either side gets a copy. What
a client does to a message reaches neither the server, which keeps what it sent, nor the next client.

One name is not public in flwr 1.41 and 1.42: `TaskIdentity`, which `Message(...)` reads run and node from.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["ClientCall", "Exchange", "InProcessGrid", "run_in_process"]

ClientCall = Callable[[Message, Context], Message]  # a ClientApp is one
_FIRST_CLIENT = 2  # node 1 is the server


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message to a client and its reply."""

    partition: int
    message_type: str
    down_bytes: int  # serialised content, server to client
    up_bytes: int
    seconds: float


class InProcessGrid(Grid):
    """Runs `client_app` for every message, in this process, in order."""

    def __init__(
        self,
        client_app: ClientCall,
        num_clients: int,
        run_config: Mapping[str, Any],
        on_start: Callable[[int, str], None] = lambda partition, kind: None,
        on_exchange: Callable[[Exchange, Message], None] = lambda exchange, reply: None,
    ) -> None:
        self._app, self._on_start, self._on_exchange = client_app, on_start, on_exchange
        self._run = Run.create_empty(run_id=uuid.uuid4().int >> 65)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self._run.run_id, 1, 1
        self._contexts = {
            number + _FIRST_CLIENT: Context(
                run_id=self._run.run_id,
                node_id=number + _FIRST_CLIENT,
                node_config={"partition-id": number, "num-partitions": num_clients},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for number in range(num_clients)
        }
        self._replies: dict[str, Message] = {}
        self.exchanges: list[Exchange] = []
        self.listener: Callable[[dict[str, Any]], None] = lambda row: None  # hears the server's ledger

    def set_run(self, run: Run) -> None:
        """Take another run's identity; Flower's interface asks for it."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid is for."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message in the older way."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All clients; they never go away."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run every message's client now."""
        names = []
        for message in messages:
            name = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = name
            self._replies[name] = self._run_client(message)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand over replies, each once."""
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull; nothing can time out here."""
        return self.pull_messages(self.push_messages(messages))

    def _run_client(self, message: Message) -> Message:
        began_s = time.perf_counter()
        context = self._contexts[message.metadata.dst_node_id]
        partition = int(context.node_config["partition-id"])
        self._on_start(partition, message.metadata.message_type)
        down, own = message_to_proto(message), context_from_proto(context_to_proto(context))
        up = message_to_proto(self._app(message_from_proto(down), own))
        context.state = recorddict_from_proto(recorddict_to_proto(own.state))
        reply = message_from_proto(up)
        exchange = Exchange(
            partition,
            message.metadata.message_type,
            down.content.ByteSize(),
            up.content.ByteSize(),
            time.perf_counter() - began_s,
        )
        self.exchanges.append(exchange)
        self._on_exchange(exchange, reply)
        return reply


def run_in_process(grid: InProcessGrid, server_app: ServerApp, run_config: Mapping[str, Any]) -> None:
    """Run the server's app on the grid until it returns."""
    context = Context(
        run_id=grid.run.run_id, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    server_app(grid=grid, context=context)
