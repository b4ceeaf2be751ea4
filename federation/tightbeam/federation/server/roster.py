"""Who takes part: the nodes that are there before the first round, and those that come later.

A node says by itself which client of the scenario it is. What its cut shares is asked of one client of each
place only: it takes a connection to the cloud.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from tightbeam.common.errors import FederationError, TightbeamError, UsageError
from tightbeam.edge.side import SidePlan
from tightbeam.federation.contract.layers import ladder_prefix, layers_of
from tightbeam.federation.math import LoraAdapter
from tightbeam.federation.scenario import ClientProfile, Scenario
from tightbeam.federation.server.claims import Claims
from tightbeam.federation.server.exchange import exchange
from tightbeam.federation.server.judging import layers_told, notes_of, said
from tightbeam.federation.server.replies import Node, failure_of

__all__ = ["Roster"]

_log = logging.getLogger(__name__)
_NODES_S = 600.0  # how long clients may take to come up
_LOOK_S = 0.5
_STEADY_S = 5.0  # Flower's simulation registers its nodes within this time
_Place = tuple[object, ...]


@dataclass(eq=False)
class Roster:
    """All clients that ever came, by name."""

    grid: Grid
    scenario: Scenario
    nodes: dict[str, Node] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # of the backbone that all have
    sides: dict[str, dict[str, Any]] = field(default_factory=dict)  # that are shared, by `ladder_prefix`
    _places: dict[_Place, tuple[LoraAdapter, frozenset[str]]] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)
    _lost: dict[int, str] = field(default_factory=dict)
    _claims: Claims = field(init=False)

    def __post_init__(self) -> None:
        self._claims = Claims(profile.name for profile in self.scenario.profiles())

    def gather(self) -> list[Node]:
        """Wait for the clients that the scenario waits for; all that are there then.

        Raises:
            FederationError: too few came, or they do not fit each other.
            TightbeamError: the first complaint of a client, in its own words.

        """
        wanted, began_s = self.scenario.wait_for or self.scenario.clients, time.monotonic()
        seen, since_s = -1, began_s
        while True:
            ids = self._there()
            if len(ids) != seen:
                seen, since_s = len(ids), time.monotonic()
                if len(ids) < wanted:
                    _log.warning("%d of %d clients are there; waiting for the others.", len(ids), wanted)
            if len(ids) >= wanted:
                self._admit(node_id for node_id in ids if node_id not in self._known)
                if len(self.nodes) >= (self.scenario.wait_for or 1):
                    return list(self.nodes.values())
            elif ids and time.monotonic() - since_s >= _STEADY_S:
                self._require_growing(len(ids), wanted)
            if time.monotonic() - began_s > _NODES_S:
                raise FederationError(
                    f"{len(self.nodes) or len(ids)} of {wanted} clients are there after {_NODES_S:.0f} s.",
                    cure="Start one node per client of the scenario, or lower clients or wait_for.",
                )
            time.sleep(_LOOK_S)

    def _require_growing(self, found: int, wanted: int) -> None:
        """Flower's simulation has as many nodes as it was told to have: nobody else will come."""
        if type(self.grid).__name__ == "InMemoryGrid":
            raise UsageError(
                f"Flower simulates {found} nodes, and the scenario waits for {wanted} clients.",
                cure=f'Run flwr run with --federation-config "num-supernodes={self.scenario.clients}".',
            )

    def lost(self) -> dict[str, str]:
        """Clients whose nodes were listed and did not answer, with the reason."""
        return {self._name(node_id): reason for node_id, reason in self._lost.items()}

    def _name(self, node_id: int) -> str:
        """Of a client; where its node was never told apart, by who is missing."""
        missing = [p.name for p in self.scenario.profiles() if p.name not in self.nodes]
        unknown = missing[0] if len(missing) == 1 else f"one of {', '.join(missing)}"
        return self._claims.client_of(node_id) or (unknown if missing else f"node {node_id}")

    def newcomers(self) -> tuple[list[Node], dict[str, str]]:
        """Clients that came since, and of those that cannot take part the reason, by node."""
        admitted, refused = [], {}
        for node_id in self._there():
            if node_id in self._known:
                continue
            try:
                admitted += self._admit([node_id])
            except TightbeamError as error:  # the others go on without it
                refused[self._claims.client_of(node_id) or f"node {node_id}"] = str(error)
        refused |= self.lost()
        return admitted, refused

    def _there(self) -> list[int]:
        """Nodes that are there now."""
        names = {info.node_id: info.name for info in self.grid.get_nodes()}
        self._claims.note_registered(names)
        return list(names)

    def _admit(self, ids: Iterable[int]) -> list[Node]:
        replies = self._ask("query.hello", ids)
        for reply in replies:
            self._lost.pop(reply.metadata.src_node_id, None)
            if reply.has_error():  # it is asked again before the next round
                self._lost[reply.metadata.src_node_id] = said(reply.error.reason or "")
            else:
                self._known.add(reply.metadata.src_node_id)
        came = [reply for reply in replies if not reply.has_error()]
        _raise_first_complaint(came)
        for reply in came:
            self._claims.bind(reply.metadata.src_node_id, said(notes_of(reply).get("client")))
        told_by = {said(notes_of(reply).get("client")): reply for reply in came}
        admitted = []
        for profile in self.scenario.profiles():
            if told := told_by.get(profile.name):
                node_id = told.metadata.src_node_id
                if (place := self._place_of(profile, node_id)) is None:
                    self._known.discard(node_id)
                else:
                    admitted.append(Node(node_id, profile, _certificate(told), *place))
        self.nodes |= {node.profile.name: node for node in admitted}
        if self.scenario.train.freeze_bottom_after is not None:
            _require_one_side_of_the_cut(self.nodes.values())
        return admitted

    def _place_of(self, profile: ClientProfile, node_id: int) -> tuple[LoraAdapter, frozenset[str]] | None:
        """What a client shares; None where it had to be asked and is lost."""
        place = profile.options.place
        if place not in self._places:
            replies = self._ask("query.layers", [node_id])
            if replies[0].has_error():
                self._lost[node_id] = said(replies[0].error.reason or "")
                return None
            _raise_first_complaint(replies)
            told = layers_told(profile.name, replies[0])
            self.facts = self.facts or told["backbone"]
            if self.facts["fingerprint"] != told["backbone"]["fingerprint"]:
                raise FederationError(
                    f"{profile.name} has another backbone than the clients before it.",
                    cure="Connect all clients to clouds of one backbone.",
                )
            if told["side"] is not None:
                self.sides[ladder_prefix(SidePlan.of(told["side"]))] = told["side"]
            self._places[place] = layers_of(told["shapes"], profile.name), frozenset(told["below"])
        return self._places[place]

    def _ask(self, message_type: str, ids: Iterable[int]) -> list[Message]:
        """Replies to an empty message."""
        messages = [Message(RecordDict({"config": ConfigRecord()}), node_id, message_type) for node_id in ids]
        return exchange(self.grid, messages)


def _raise_first_complaint(replies: Iterable[Message]) -> None:
    for reply in replies:
        if (failure := failure_of(reply)) is not None:
            raise failure


def _require_one_side_of_the_cut(nodes: Iterable[Node]) -> None:
    """A layer that some keep frozen below their cut must not go on learning above that of others."""
    nodes = list(nodes)
    below = {layer: node.profile.name for node in nodes for layer in node.below}
    for node in nodes:
        for layer in sorted((below.keys() & node.layers.modules) - node.below):
            raise FederationError(
                f"{layer} is below the cut of {below[layer]} and above that of {node.profile.name}, so it "
                "cannot be frozen.",
                cure="Choose cuts that do not overlap, or leave train.freeze_bottom_after out.",
            )


def _certificate(reply: Message) -> bytes:
    value = notes_of(reply).get("certificate", b"")
    return value if isinstance(value, bytes) else b""
