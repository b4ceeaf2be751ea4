"""`FederatedLora`: the Message-API strategy that sends each client its part and takes back what is sound.

What comes back is sorted into `ok`, `failed` (with the client's own words), `refused` (NaN, other shapes),
`late`, `dropped` and `left`. Only `ok` is combined. Every message is accounted for, whatever came of it.
"""

import random
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tightbeam.common.errors import CohortError, UpdateRefusedError
from tightbeam.common.federation import LoraAdapter, Update
from tightbeam.simulations.apps.combining import Accepted, Combined, Memory, combiner_for, trained_part
from tightbeam.simulations.apps.privacy import Accounting
from tightbeam.simulations.apps.replies import Node, account_of, masked_of, spread, update_of
from tightbeam.simulations.apps.secure import SecureRounds, SecureSum
from tightbeam.simulations.apps.terms import Purpose
from tightbeam.simulations.global_adapter import GlobalAdapter, from_record, restricted, to_record
from tightbeam.simulations.journal import Journal, Row
from tightbeam.simulations.scenario import Scenario

__all__ = ["FederatedLora"]


_ROWS: Mapping[Purpose, str] = {"train": "client_round", "evaluate": "client_eval"}
_PRIVACY = "privacy/"


class FederatedLora(Strategy):
    """One experiment's strategy; `arrays` are a `GlobalAdapter` in Flower's form."""

    def __init__(
        self, scenario: Scenario, nodes: Iterable[Node], journal: Journal, backbone: str = ""
    ) -> None:
        self.scenario, self.journal = scenario, journal
        privacy = scenario.strategy.privacy
        self.accounting = None if privacy is None else Accounting(scenario, privacy)
        self.combiner = combiner_for(scenario, self.accounting)
        self._nodes = {node.profile.name: node for node in nodes}
        self._by_id = {node.node_id: node for node in self._nodes.values()}
        self._state, self._number = GlobalAdapter(LoraAdapter({}, {})), 0
        self._folds = scenario.folds
        self._sent: dict[int, Message] = {}
        self._secure: SecureRounds | None = None
        if scenario.strategy.secure:
            self._secure = SecureRounds(scenario, backbone)
            self.admit(self._nodes.values())

    def summary(self) -> None:
        """Nothing to log: the journal has it."""

    def admit(self, nodes: Iterable[Node]) -> None:
        """Let clients in that came after the first round."""
        for node in nodes:
            self._nodes[node.profile.name] = self._by_id[node.node_id] = node
            if self._secure is not None:
                self._secure.admit(node.profile.name, node.node_id, node.certificate)

    def present(self) -> list[Node]:
        """Clients that have not left, by name."""
        left = {row["client"] for row in self.journal.rows if row.get("status") == "left"}
        return [self._nodes[name] for name in sorted(self._nodes.keys() - left)]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients by the seed and send each its layers at its rank."""
        present = self.present()
        draw = random.Random(f"{self.scenario.seed}/sample/{server_round}")  # noqa: S311  no secret
        chosen = draw.sample(present, min(self.scenario.sampled, len(present)))
        chosen.sort(key=lambda node: node.profile.name)
        messages = self._messages(server_round, arrays, config, chosen, MessageType.TRAIN)
        if not messages:
            return []
        first = messages[0].content.array_records["arrays"]
        frozen = self._frozen(chosen[0])
        told = self.combiner.prepare(server_round, first, len(messages), grid, frozen)
        for message in messages:
            message.content.config_records["config"].update(told)
        return messages if self._secure is None else self._opened(server_round, "train", messages, grid)

    def _opened(self, number: int, purpose: Purpose, messages: list[Message], grid: Grid) -> list[Message]:
        """The messages of those who agreed on keys and shares; the others have failed in this round."""
        assert self._secure is not None
        sent = messages[0].content.array_records["arrays"]
        names = {m.metadata.dst_node_id: self._by_id[m.metadata.dst_node_id].profile.name for m in messages}
        frozen = self._frozen(self._by_id[messages[0].metadata.dst_node_id])
        opened = self._secure.open(number, purpose, sent, list(names.values()), grid, frozen)
        kind = _ROWS[purpose]
        for name, reason in sorted(opened.failures.items()):
            # It was sent nothing to work on, so its row has no costs.
            figures: Row = {"status": "failed", "reason": reason, "run": "", "codec": ""}
            self.journal.append(kind, round=number, client=name, **figures)
        ready = [m for m in messages if names[m.metadata.dst_node_id] in opened.inboxes]
        for message in ready:
            inbox = opened.inboxes[names[message.metadata.dst_node_id]]
            message.content.config_records["secure"] = ConfigRecord({"inbox": inbox})
        return ready

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine what is sound.

        Raises:
            CohortError: every client failed or was refused; the message has the first one's words.

        """
        accepted, rows = [], []
        for reply in sorted(replies, key=self._name_of):
            node = self._by_id[reply.metadata.src_node_id]
            row, good = self._judge(node, reply)
            row = self.journal.append(_ROWS["train"], round=server_round, client=node.profile.name, **row)
            rows.append(row)
            accepted += [good] if good else []
        failed = [row for row in rows if row["status"] in ("failed", "refused")]
        if failed and not accepted:
            raise CohortError(
                f"No update in round {server_round}: {failed[0]['client']} says: {failed[0]['reason']}",
                cure="Correct what it says, then go on with --resume.",
            )
        return self._combine(server_round, accepted, rows)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every client that is present, in the first and last round and as often as the scenario says."""
        if not self.scenario.evaluated_after(server_round):
            return []
        messages = self._messages(server_round, arrays, config, self.present(), MessageType.EVALUATE)
        if self._secure is None:
            return messages
        if len(messages) < self.scenario.strategy.min_cohort:
            self._no_evaluation(
                server_round, f"{len(messages)} clients are left, too few to hide each other."
            )
            return []
        try:
            return self._opened(server_round, "evaluate", messages, grid)
        except CohortError as too_few:
            self._no_evaluation(server_round, str(too_few))
            return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean held-out loss over clients, each by its learned tokens."""
        losses: dict[str, tuple[float, int]] = {}
        masked: dict[str, bytes] = {}
        virtual_s = 0.0
        for reply in sorted(replies, key=self._name_of):
            name = self._name_of(reply)
            row = account_of(self._sent[reply.metadata.src_node_id], reply)
            row = self.journal.append(_ROWS["evaluate"], round=server_round, client=name, **row)
            if row["status"] == "ok":
                virtual_s = max(virtual_s, row["virtual_s"])
                if self._secure:
                    masked[name] = masked_of(reply)
                else:
                    losses[name] = row["loss"], row["weight"]
        try:
            figures = self._secure_evaluation(masked) if self._secure else spread(losses)
        except CohortError as too_few:
            self._no_evaluation(server_round, str(too_few))
            return None
        if figures is None:
            return None
        secure_bytes = self._secure.moved_bytes if self._secure else 0
        self.journal.append(
            "evaluation", round=server_round, virtual_s=virtual_s, secure_bytes=secure_bytes, **figures
        )
        return MetricRecord({name: value for name, value in figures.items() if value is not None})

    def _secure_evaluation(self, masked: Mapping[str, bytes]) -> dict[str, float | None]:
        assert self._secure is not None
        found = self._secure.close(masked)
        nobodys = dict.fromkeys(("worst", "median", "best"))
        return {"clients": len(found.survivors), "loss": found.loss, **nobodys}

    def _no_evaluation(self, number: int, reason: str) -> None:
        self.journal.append("no_evaluation", round=number, reason=reason)

    def _messages(
        self,
        number: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        nodes: Iterable[Node],
        message_type: str,
    ) -> list[Message]:
        self._state, self._number = GlobalAdapter.from_arrays(from_record(arrays)), number
        messages = []
        for node in nodes:
            content = self._content(node, number)
            content.config_records["config"].update(config)
            messages.append(Message(content, node.node_id, message_type))
        self._sent = {message.metadata.dst_node_id: message for message in messages}
        return messages

    def _content(self, node: Node, number: int) -> RecordDict:
        """One client's part of the global adapter, and what it has spent so far."""
        name, spent = node.profile.name, self.journal.spent(node.profile.name)
        own, fold = self._state.for_client(
            node.layers.shapes(),
            node.profile.options.r,
            self.scenario.adapter.scale,
            self._seed(number),
            folds=self._folds,
        )
        before = self.journal.of_client(name, "client_round", "client_eval")
        config = ConfigRecord(
            {
                "server-round": number,
                "first": not any(row.get("weight_bytes") for row in before),
                "spent-mb": spent.mb,
                "spent-joules": spent.joules,
                "spent-money": spent.money,
            }
        )
        records: dict[str, Any] = {"arrays": to_record(own), "config": config}
        return RecordDict(records | ({"fold": to_record(fold)} if fold else {}))

    def _seed(self, number: int) -> int:
        """Of the directions that widen a rank; a frozen bottom must not change in them either."""
        return self.scenario.seed + min(number, self.scenario.train.freeze_bottom_after or number)

    def _trained(self, node: Node) -> LoraAdapter:
        """What a client hands back in this round: once the bottom is frozen, nothing below its cut."""
        return restricted(node.layers, node.layers.shapes().keys() - self._frozen(node))

    def _frozen(self, node: Node) -> frozenset[str]:
        """Layers that a client has and does not train in this round."""
        freeze = self.scenario.train.freeze_bottom_after
        return frozenset() if freeze is None or self._number <= freeze else node.below

    def _name_of(self, reply: Message) -> str:
        return self._by_id[reply.metadata.src_node_id].profile.name

    def _judge(self, node: Node, reply: Message) -> tuple[Row, Accepted | None]:
        row = account_of(self._sent[reply.metadata.src_node_id], reply)
        if row["status"] != "ok":
            return row, None
        layers = frozenset(self._trained(node).shapes())
        try:
            # Of a masked update there is nothing to check: its owner has, before the masks.
            update = None if self._secure else self._update(node, reply, row["weight"])
        except UpdateRefusedError as error:
            return row | {"status": "refused", "reason": str(error)}, None
        limit_s = self.scenario.faults.deadline_s
        if limit_s is not None and row["virtual_s"] > limit_s:
            reason = f"Its update came after {row['virtual_s']:.1f} s, the deadline is {limit_s:g} s."
            return row | {"status": "late", "reason": reason}, None
        return row, Accepted(update, layers, reply)

    def _update(self, node: Node, reply: Message, weight: float) -> Update:
        return update_of(self.scenario, node, self._trained(node), self._sent[node.node_id], reply, weight)

    def _combine(
        self, number: int, accepted: list[Accepted], rows: list[Row]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        virtual_s = max((row.get("virtual_s", 0.0) for row in rows), default=0.0)
        if self.scenario.faults.deadline_s is not None:
            virtual_s = min(virtual_s, self.scenario.faults.deadline_s)
        figures: Row = {"round": number, "updates": len(accepted), "virtual_s": virtual_s}
        if self.accounting is not None:
            figures["delta"] = self.accounting.section.delta
        secure: SecureSum | None = None
        try:
            if self._secure and accepted:
                # By the node that Flower authenticated, not by what it calls itself.
                masked = {self._name_of(one.reply): masked_of(one.reply) for one in accepted}
                secure = self._secure.close(masked)
                figures["updates"] = len(secure.survivors)
        except CohortError as too_few:  # a round has the right sum or none
            return self._no_update(figures, str(too_few), *self._told())
        if not accepted:
            return self._no_update(figures, "no update")
        if secure is None:
            combined = self.combiner.combine(number, self._state, accepted)
            good = [row for row in rows if row["status"] == "ok"]
            loss = sum(row["loss"] * row["weight"] for row in good) / sum(row["weight"] for row in good)
        else:
            combined, loss = self._secure_mean(number, secure), secure.loss
        figures |= {"loss": loss, "relative_error": combined.relative_error, "notes": list(combined.notes)}
        self.journal.append("round", **figures, **self._spent())
        return to_record(combined.state.arrays()), MetricRecord({"loss": loss, "updates": len(accepted)})

    def _no_update(self, figures: Row, *why: str) -> tuple[None, None]:
        figures |= {"loss": None, "relative_error": None, "notes": list(why)}
        self.journal.append("round", **figures, **self._spent())
        return None, None

    def _told(self) -> list[str]:
        """Who failed in an exchange of this secure round, in its own words."""
        failures = self._secure.failures if self._secure else {}
        return [f"{name}: {reason}" for name, reason in sorted(failures.items())]

    def _spent(self) -> Row:
        """What this round took of privacy, and for the exchanges that keep it secure."""
        spent = {} if self.accounting is None else {"epsilon": self.accounting.epsilon}
        return spent | ({} if self._secure is None else {"secure_bytes": self._secure.moved_bytes})

    def _secure_mean(self, number: int, found: SecureSum) -> Combined:
        assert self._secure is not None
        mean: dict[str, Any] = dict(found.mean)
        node_id, message = next(iter(self._sent.items()))
        sent = from_record(message.content.array_records["arrays"])
        trained = trained_part(sent, self.scenario, self._frozen(self._by_id[node_id]))
        mean |= {name: array for name, array in sent.items() if name not in trained}
        combined = self.combiner.after_mean(self._state, number, mean)
        if self.accounting is not None:
            self.accounting.release(self.accounting.section.noise_multiplier)
        return Combined(combined.state, (*combined.notes, *self._told()))

    def memory(self) -> Memory:
        """What must survive a restart, beside the global adapter."""
        found = self.combiner.memory()
        if self.accounting is not None:
            found |= {_PRIVACY + name: array for name, array in self.accounting.memory().items()}
        return found

    def remember(self, memory: Memory) -> None:
        """Inverse of `memory`."""
        own = {name.removeprefix(_PRIVACY): a for name, a in memory.items() if name.startswith(_PRIVACY)}
        if self.accounting is not None:
            self.accounting.remember(own)
        self.combiner.remember({name: a for name, a in memory.items() if not name.startswith(_PRIVACY)})
