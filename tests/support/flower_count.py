"""What passes between Flower's server and clients, counted by Flower itself while an experiment runs."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray

from tightbeam.federation.runtimes.grid import ClientCall
from tightbeam.simulations.client_app import app

__all__ = ["FlowerCount"]

_KINDS = {"train": "client_round", "evaluate": "client_eval"}
Key = tuple[str, int, str]  # kind of row, round, client


@dataclass
class FlowerCount:
    """A client app, with every array in its messages counted by Flower's `count_bytes`."""

    app: ClientCall = app
    moved: Counter[tuple[str, int, str, str]] = field(default_factory=Counter)  # and the direction
    ladders: Counter[Key] = field(default_factory=Counter)  # of what went down
    folds: Counter[Key] = field(default_factory=Counter)  # of what went down
    keys: Counter[tuple[str, int]] = field(default_factory=Counter)  # secure exchanges besides the work
    worn: dict[tuple[int, str], dict[str, NDArray[Any]]] = field(
        default_factory=dict
    )  # after its steps, and folded
    _sum: list[int] = field(default_factory=list)  # exchanges before the work that they are for
    _of: tuple[str, int] | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as a client does."""
        kind = _KINDS.get(message.metadata.message_type)
        if kind is None:
            return self._besides(message, context)
        number = int(str(message.content.config_records["config"]["server-round"]))
        client = f"client-{int(context.node_config['partition-id']):02d}"
        key = kind, number, client
        sent = dict(message.content.array_records)
        self.moved[*key, "down"] += _bytes(sent.values())
        self.folds[key] += _bytes(record for name, record in sent.items() if name == "fold")
        ladder = {name: array for name, array in sent["arrays"].items() if name.startswith("ladder.")}
        self.ladders[key] += ArrayRecord(ladder).count_bytes()
        self._of = kind, number
        self.keys[self._of] += sum(self._sum)
        self._sum = []
        reply = self.app(message, context)
        self.moved[*key, "up"] += _handed_in(reply)
        if kind == "client_round" and (given := reply.content.array_records.get("arrays")) is not None:
            trained = {name.partition(".lora_")[0] for name in given}
            before = {n: a for n, a in _numpy(sent["arrays"]).items() if n.partition(".lora_")[0] in trained}
            folded = {f"fold/{n}": a for n, a in _numpy(sent["fold"]).items()} if "fold" in sent else {}
            self.worn[number, client] = before | _numpy(given) | folded
        return reply

    def _besides(self, message: Message, context: Context) -> Message:
        reply_bytes = _size(message.content)
        asked = message.content.config_records.get("secure")
        step = asked["step"] if asked else None
        reply = self.app(message, context)
        reply_bytes += _size(reply.content)
        if step in ("join", "share"):
            self._sum.append(reply_bytes)
        elif step is not None and self._of is not None:
            self.keys[self._of] += reply_bytes
        return reply


def _handed_in(reply: Message) -> int:
    """Arrays, or in their place the masked vector."""
    if not reply.has_content():
        return 0
    masked = reply.content.config_records["notes"].get("secure")
    if isinstance(masked, bytes) and reply.metadata.message_type == "train":
        return ConfigRecord({"": masked}).count_bytes()
    return _bytes(reply.content.array_records.values())


def _bytes(records: Iterable[ArrayRecord]) -> int:
    return sum(record.count_bytes() for record in records)


def _numpy(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    arrays: dict[str, Array] = dict(record)
    return {name: array.numpy().copy() for name, array in arrays.items()}


def _size(content: RecordDict) -> int:
    return int(recorddict_to_proto(content).ByteSize())
