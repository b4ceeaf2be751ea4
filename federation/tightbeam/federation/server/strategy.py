"""`FederatedLora`: the Message-API strategy that sends each client its part and takes back what is sound.

What comes back is sorted into `ok`, `failed` (with the client's own words), `refused` (NaN, other shapes),
`late`, `dropped` and `left`. Only `ok` is combined. Every message is accounted for, whatever came of it.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tightbeam.common.errors import CloudUnavailableError, CohortError, UpdateRefusedError
from tightbeam.federation.contract.records import from_record, to_record
from tightbeam.federation.contract.terms import Purpose
from tightbeam.federation.math import Arrays, LoraAdapter
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.combining import Accepted, Combined, Memory, combiner_for, trained_part
from tightbeam.federation.server.global_adapter import GlobalAdapter, restricted
from tightbeam.federation.server.journal import CUT_OFF, Journal, Row
from tightbeam.federation.server.judging import missed_of
from tightbeam.federation.server.privacy import Accounting
from tightbeam.federation.server.replies import Node, account_of, cost_of, masked_of, spread, update_of
from tightbeam.federation.server.secure import SecureRounds, SecureSum

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
        self._sent: dict[int, Row] = {}  # what this exchange's messages cost, by node
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
        return [self._nodes[name] for name in sorted(self._nodes.keys() - self.journal.left())]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients by the seed and send each its layers at its rank."""
        present = self.present()
        draw = random.Random(f"{self.scenario.seed}/sample/{server_round}")  # noqa: S311  no secret
        chosen = draw.sample(present, min(self.scenario.sampled, len(present)))
        chosen.sort(key=lambda node: node.profile.name)
        if not chosen:
            return []
        self._begin(server_round, arrays)
        first, _ = self._part(chosen[0])
        frozen = self._frozen(chosen[0])
        told = self.combiner.prepare(server_round, to_record(first), len(chosen), grid, frozen)
        inboxes = self._opened("train", chosen, grid) if self._secure else {}
        config = ConfigRecord({**config, **told})
        return self._messages(chosen, config, MessageType.TRAIN, inboxes)

    def _begin(self, number: int, arrays: ArrayRecord) -> None:
        self._state, self._number = GlobalAdapter.from_arrays(from_record(arrays)), number
        self._sent = {}

    def _opened(self, purpose: Purpose, nodes: Sequence[Node], grid: Grid) -> Mapping[str, bytes]:
        """Inboxes of those who agreed on keys and shares; the others have failed in this round."""
        assert self._secure is not None
        sent, names = to_record(self._part(nodes[0])[0]), [node.profile.name for node in nodes]
        opened = self._secure.open(self._number, purpose, sent, names, grid, self._frozen(nodes[0]))
        for name, reason in sorted(opened.failures.items()):
            # It was sent nothing to work on, so its row has no costs.
            figures: Row = {"status": "failed", "reason": reason, "run": "", "codec": ""}
            self.journal.append(_ROWS[purpose], round=self._number, client=name, **figures)
        return opened.inboxes

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
        self._require_cloud(rows)
        failed = [row for row in rows if row["status"] in ("failed", "refused")]
        if failed and not accepted:
            raise CohortError(
                f"No update in round {server_round}: {failed[0]['client']} says: {failed[0]['reason']}",
                cure="Correct what it says, then go on with --resume.",
            )
        return self._combine(server_round, accepted, rows)

    def _require_cloud(self, rows: Sequence[Row]) -> None:
        """Do not take a round for one, in which most could not reach the cloud.

        Raises:
            CloudUnavailableError: it is away for more than half of those who answered.

        """
        away = [row for row in rows if row.get("code") == CloudUnavailableError.code]
        if 2 * len(away) > len(rows):
            raise CloudUnavailableError(
                f"The cloud is away for {len(away)} of {len(rows)} clients in round {self._number}: "
                f"{away[0]['client']} says: {away[0]['reason']}",
                cure="Start the cloud again, then go on with --resume.",
            )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the scenario's sample, in the first and last round and as often as the scenario says.

        It is the same sample each time, as long as its clients are there: means over others tell nothing.
        """
        if not self.scenario.evaluated_after(server_round):
            return []
        nodes, inboxes = self._evaluating(server_round), dict[str, bytes]()
        if not nodes:
            return []
        self._begin(server_round, arrays)
        if self._secure is not None:
            try:
                if len(nodes) < self.scenario.strategy.min_cohort:
                    raise CohortError(f"{len(nodes)} clients are left, too few to hide each other.")
                inboxes = dict(self._opened("evaluate", nodes, grid))
            except CohortError as too_few:
                self._no_evaluation(server_round, str(too_few))
                return []
        return self._messages(nodes, config, MessageType.EVALUATE, inboxes)

    def _evaluating(self, number: int) -> list[Node]:
        """Whom to ask; at the end all, where they keep adapters of their own."""
        profiles, present = self.scenario.profiles(), {n.profile.name: n for n in self.present()}
        names = [profile.name for profile in profiles]
        random.Random(f"{self.scenario.seed}/evaluate").shuffle(names)  # noqa: S311  no secret
        own = any(one.options.keeps_own for one in profiles)
        most = len(names) if own and number == self.scenario.rounds else self.scenario.evaluated
        return [present[name] for name in sorted([name for name in names if name in present][:most])]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean held-out loss over clients, each by its learned tokens."""
        losses: dict[str, tuple[float, int]] = {}
        masked: dict[str, bytes] = {}
        virtual_s, rows = 0.0, list[Row]()
        for reply in sorted(replies, key=self._name_of):
            name = self._name_of(reply)
            row = self._account(reply, "evaluate")
            if self._secure and row["status"] == "ok":
                try:
                    masked[name] = masked_of(name, reply)
                except UpdateRefusedError as error:
                    row |= {"status": "refused", "reason": str(error)}
            row = self.journal.append(_ROWS["evaluate"], round=server_round, client=name, **row)
            rows.append(row)
            if row["status"] == "ok":
                virtual_s = max(virtual_s, row["virtual_s"])
                if not self._secure:
                    losses[name] = row["loss"], row["weight"]
        self._require_cloud(rows)
        try:
            figures = self._secure_evaluation(masked) if self._secure else spread(losses)
        except CohortError as too_few:
            self._no_evaluation(server_round, str(too_few))
            return None
        if figures is None:
            if rows:
                self._no_evaluation(server_round, f"{rows[0]['client']} says: {rows[0]['reason']}")
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
        self, nodes: Iterable[Node], config: ConfigRecord, message_type: str, inboxes: Mapping[str, bytes]
    ) -> Iterator[Message]:
        """One message after the other: of all of them at once there may be more than memory holds."""
        for node in nodes:
            name = node.profile.name
            if self._secure and name not in inboxes:
                continue
            message = Message(self._content(node, config), node.node_id, message_type)
            if self._secure:
                message.content.config_records["secure"] = ConfigRecord({"inbox": inboxes[name]})
            self._sent[node.node_id] = cost_of(message)
            yield message
            del message

    def _part(self, node: Node) -> tuple[Arrays, Arrays]:
        """What a client wears of the global adapter, and what it folds into its weights."""
        return self._state.for_client(
            node.layers.shapes(),
            node.profile.options.r,
            self.scenario.adapter.scale,
            self._seed(self._number),
            folds=self._folds,
        )

    def _content(self, node: Node, told: ConfigRecord) -> RecordDict:
        """One client's part of the global adapter, and what it has spent so far."""
        name, (own, fold) = node.profile.name, self._part(node)
        spent = self.journal.spent(name)
        config = ConfigRecord(
            {
                "server-round": self._number,
                "first": not any(row.get("weight_bytes") for row in self.journal.of_client(name)),
                "spent-mb": spent.mb,
                "spent-joules": spent.joules,
                "spent-money": spent.money,
                **told,
            }
        )
        if name in self.journal.unheard:
            runs = [row["run"] for row in self.journal.of_client(name) if row.get("run")]
            config["known-run"] = runs[-1] if runs else ""
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

    def _account(self, reply: Message, purpose: Purpose) -> Row:
        name, sent = self._name_of(reply), self._sent[reply.metadata.src_node_id]
        row = account_of(self.scenario, name, sent, reply, trains=purpose == "train")
        if name in self.journal.unheard and not reply.has_error():
            self.journal.unheard.discard(name)
            if missed := missed_of(name, reply):
                self.journal.append(_ROWS[purpose], round=self._number, client=name, **CUT_OFF, **missed)
        return row

    def _judge(self, node: Node, reply: Message) -> tuple[Row, Accepted | None]:
        row = self._account(reply, "train")
        if row["status"] != "ok":
            return row, None
        layers = frozenset(self._trained(node).shapes())
        try:
            # Of a masked update there is nothing more to check: its owner has, before the masks.
            update = None
            if self._secure:
                masked_of(node.profile.name, reply)
            else:
                start = self._part(node)[0] if self.scenario.strategy.name == "ffa" else {}
                update = update_of(self.scenario, node, self._trained(node), start, reply, row["weight"])
                if not self.combiner.reads_replies:
                    del reply.content.array_records["arrays"]
        except UpdateRefusedError as error:
            return row | {"status": "refused", "reason": str(error)}, None
        limit_s = self.scenario.faults.deadline_s
        if limit_s is not None and row["virtual_s"] > limit_s:
            reason = f"Its update came after {row['virtual_s']:.1f} s, the deadline is {limit_s:g} s."
            return row | {"status": "late", "reason": reason}, None
        return row, Accepted(update, layers, reply)

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
                names = [self._name_of(one.reply) for one in accepted]
                masked = {n: masked_of(n, one.reply) for n, one in zip(names, accepted, strict=True)}
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
        node = self._by_id[next(iter(self._sent))]  # all have the same
        sent = self._part(node)[0]
        trained = trained_part(sent, self.scenario, self._frozen(node))
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
