"""Secure rounds over Flower's messages without a cloud and without training: updates are what a test says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from tightbeam.common.errors import TightbeamError
from tightbeam.common.identity.identities import load_identity
from tightbeam.federation.client.participant import Client
from tightbeam.federation.client.secure import SecureTask, answer_step
from tightbeam.federation.contract.records import to_record
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.contract.terms import Purpose
from tightbeam.federation.runtimes.grid import InProcessGrid
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.federation.server.secure import SecureRounds, SecureSum

__all__ = ["SecureNodes", "adapter", "secure_scenario"]

Arrays = dict[str, NDArray[Any]]
BACKBONE = "a fingerprint"


def secure_scenario(clients: int, **strategy: Any) -> Scenario:
    return scenario_from_mapping(
        {"clients": clients, "rounds": 1, "strategy": {"secure": True, **strategy}, "client": {"r": 2}}
    )


def adapter(seed: int, scale: float = 0.1) -> Arrays:
    """One layer's factors under PEFT's names, in float32."""
    rng = np.random.default_rng(seed)
    shapes = {"m.layers.0.q.lora_A.weight": (2, 30), "m.layers.0.q.lora_B.weight": (20, 2)}
    return {name: scale * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@dataclass
class SecureNodes:
    """Nodes that answer as the client app does; what each of them learned is in `updates`."""

    scenario: Scenario
    certs: Path
    folder: Path
    updates: dict[str, Arrays] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    backbone: str = BACKBONE  # the fingerprint that clients find at their clouds
    gone: set[str] = field(default_factory=set)  # vanish before they send a vector
    replies: list[Message] = field(default_factory=list)  # all that the server ever got
    start: Arrays = field(default_factory=lambda: adapter(99))  # of round 1; later ones have moved

    def __post_init__(self) -> None:
        names = [profile.name for profile in self.scenario.profiles()]
        for number, name in enumerate(names):
            self.updates.setdefault(name, adapter(number))
            self.weights.setdefault(name, number + 1)
            self.losses.setdefault(name, 1.0 + number)
        self.settings = RunConfig(self.scenario, "127.0.0.1:1", self.certs, self.folder)
        self.grid = InProcessGrid(self, len(names), {})
        self.ids = dict(zip(names, self.grid.get_node_ids(), strict=True))
        self.server = SecureRounds(self.scenario, BACKBONE)
        for name in names:
            self.server.admit(name, self.ids[name], load_identity(self.certs / name).certificate_der)

    def __call__(self, message: Message, context: Context) -> Message:
        profile = self.settings.profile(context.node_config)
        client = Client(self.settings, profile, dict(context.node_config))
        notes: dict[str, Any] = {"client": profile.name, "status": "ok"}
        try:
            notes["secure"] = self._answer(client, context, message)
        except TightbeamError as error:
            notes |= {"status": "failed", "reason": str(error)}
        reply = Message(RecordDict({"notes": ConfigRecord(notes)}), reply_to=message)
        self.replies.append(reply)
        return reply

    def _answer(self, client: Client, context: Context, message: Message) -> bytes:
        if message.metadata.message_type == "query.secure":
            return answer_step(client, context, message.content)
        name = client.profile.name
        purpose: Purpose = "evaluate" if message.metadata.message_type == "evaluate" else "train"
        arrays = self.updates[name] if purpose == "train" else {}
        task = SecureTask.of(client, context, message.content, purpose, self.backbone)
        return task.masked(arrays, self.weights[name], self.losses[name])

    def work(
        self,
        number: int = 1,
        *,
        sent: Mapping[str, Arrays] | None = None,
        purpose: Any = "train",
        kind: str = "",
    ) -> dict[str, Message]:
        """Open a round and have everybody hand in a vector who is not gone.

        `sent` is for clients apart; `kind` is the messages' own, if they shall ask for something else.
        """
        start = {name: array + np.float32(number - 1) for name, array in self.start.items()}
        record = to_record(start)
        self.opened = self.server.open(number, purpose, record, list(self.ids), self.grid)
        messages = []
        for name, inbox in self.opened.inboxes.items():
            if name not in self.gone:
                arrays: ArrayRecord = to_record((sent or {}).get(name, start))
                records: dict[str, Any] = {"arrays": arrays, "secure": ConfigRecord({"inbox": inbox})}
                records["config"] = ConfigRecord({"server-round": number})
                messages.append(Message(RecordDict(records), self.ids[name], kind or purpose))
        replies = self.grid.send_and_receive(messages)
        return {str(reply.content.config_records["notes"]["client"]): reply for reply in replies}

    def run(self, number: int = 1, **options: Any) -> SecureSum:
        """A whole round."""
        return self.server.close(self.vectors(self.work(number, **options)))

    @staticmethod
    def vectors(replies: Mapping[str, Message]) -> dict[str, bytes]:
        """What those sent who did not fail."""
        notes = {name: reply.content.config_records["notes"] for name, reply in replies.items()}
        return {name: data for name, n in notes.items() if isinstance(data := n.get("secure"), bytes)}

    def mean(self, names: list[str]) -> Arrays:
        """The weighted mean of these clients' updates, in the clear."""
        total = sum(self.weights[name] for name in names)
        return {
            tensor: np.sum(
                [self.weights[name] / total * self.updates[name][tensor] for name in names], axis=0
            )
            for tensor in self.start
        }
