"""Who takes part: the nodes that are there before the first round, and those that come later.

A node says by itself which client of the scenario it is. What its cut shares is asked of one client of each
place only: it takes a connection to the cloud.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from tightbeam.common.errors import FederationError, TightbeamError
from tightbeam.common.federation import LoraAdapter
from tightbeam.edge.federation import ladder_prefix
from tightbeam.edge.side import SidePlan
from tightbeam.simulations.apps.claims import Claims
from tightbeam.simulations.apps.exchange import exchange
from tightbeam.simulations.apps.replies import Node, failure_of
from tightbeam.simulations.global_adapter import layers_of
from tightbeam.simulations.scenario import ClientProfile, Scenario

__all__ = ["Roster"]

_NODES_S = 600.0  # how long clients may take to come up
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
    _claims: Claims = field(init=False)

    def __post_init__(self) -> None:
        self._claims = Claims(profile.name for profile in self.scenario.profiles())

    def gather(self) -> list[Node]:
        """Wait for the clients that the scenario waits for; all that are there then.

        Raises:
            FederationError: too few came, or they do not fit each other.
            TightbeamError: the first complaint of a client, in its own words.

        """
        wanted, deadline_s = self.scenario.wait_for or self.scenario.clients, time.monotonic() + _NODES_S
        while len(ids := self._there()) < wanted:
            if time.monotonic() > deadline_s:
                raise FederationError(
                    f"{len(ids)} of {wanted} clients are there after {_NODES_S:.0f} s.",
                    cure="Start one node per client of the scenario, or lower clients or wait_for.",
                )
            time.sleep(0.5)
        return self._admit(ids)

    def newcomers(self) -> tuple[list[Node], dict[str, str]]:
        """Clients that came since, and of those that cannot take part the reason, by node."""
        admitted, refused = [], {}
        for node_id in self._there():
            if node_id in self._known:
                continue
            try:
                admitted += self._admit([node_id])
            except TightbeamError as error:  # the others go on without it
                refused[f"node {node_id}"] = str(error)
        return admitted, refused

    def _there(self) -> list[int]:
        """Nodes that are there now."""
        names = {info.node_id: info.name for info in self.grid.get_nodes()}
        self._claims.note_registered(names)
        return list(names)

    def _admit(self, ids: Iterable[int]) -> list[Node]:
        ids = list(ids)
        self._known |= set(ids)
        replies = self._ask("query.hello", ids)
        for said in replies:
            self._claims.bind(said.metadata.src_node_id, str(_notes(said)["client"]))
        told_by = {str(_notes(reply)["client"]): reply for reply in replies}
        admitted = []
        for profile in self.scenario.profiles():
            if reply := told_by.get(profile.name):
                node_id = reply.metadata.src_node_id
                layers, below = self._place_of(profile, node_id)
                admitted.append(Node(node_id, profile, _certificate(reply), layers, below))
        self.nodes |= {node.profile.name: node for node in admitted}
        if self.scenario.train.freeze_bottom_after is not None:
            _require_one_side_of_the_cut(self.nodes.values())
        return admitted

    def _place_of(self, profile: ClientProfile, node_id: int) -> tuple[LoraAdapter, frozenset[str]]:
        place = profile.options.place
        if place not in self._places:
            (reply,) = self._ask("query.layers", [node_id])
            told = json.loads(str(_notes(reply)["layers"]))
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
        """Replies to an empty message; the first complaint is raised."""
        messages = [Message(RecordDict({"config": ConfigRecord()}), node_id, message_type) for node_id in ids]
        replies = exchange(self.grid, messages)
        for reply in replies:
            if (failure := failure_of(reply)) is not None:
                if reply.has_error():  # Flower's words, which do not say of whom
                    raise FederationError(f"Node {reply.metadata.src_node_id}: {failure.message}")
                raise failure
        return replies


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


def _notes(reply: Message) -> ConfigRecord:
    return reply.content.config_records["notes"]


def _certificate(reply: Message) -> bytes:
    value = _notes(reply).get("certificate", b"")
    return value if isinstance(value, bytes) else b""
