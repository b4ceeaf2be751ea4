"""The adapter that an experiment leaves, evaluated as whoever opens `adapter/` gets it.

In a round each client wears its own part of the global adapter: the layers of its cut, at its rank. Where
that is less than what is written, all clients evaluate the written adapter once, after the last round: at a
cut that holds all its layers, every text anew. That is a figure for the report, and in no budget and no sum
of the experiment.
"""

from collections.abc import Iterable
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from tightbeam.federation.contract.messages import EXPORTED
from tightbeam.federation.contract.records import to_record
from tightbeam.federation.math import LoraAdapter
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.exchange import exchange
from tightbeam.federation.server.global_adapter import GlobalAdapter
from tightbeam.federation.server.replies import Node, account_of, cost_of, spread
from tightbeam.federation.server.strategy import FederatedLora

__all__ = ["evaluate_exported"]


def evaluate_exported(strategy: FederatedLora, grid: Grid, final: GlobalAdapter) -> None:
    """Ask all clients for the loss of what was written, unless their own parts are all of it."""
    scenario, journal, whole = strategy.scenario, strategy.journal, final.whole()
    if any(row["row"] == "exported" and row["round"] == scenario.rounds for row in journal.rows):
        return
    nodes = {node.node_id: node for node in strategy.present()}
    if all(_wears_all(node, final, whole, scenario) for node in nodes.values()):
        journal.append("exported", round=scenario.rounds, asked=False)
        return
    if scenario.strategy.secure:  # a client's loss is its own, and sums are for what all of them wear
        return
    even = whole.resized(max(whole.rank, 1))
    arrays, cut = to_record(even.state(scenario.adapter.scale)), _widest_cut(nodes.values())
    config: dict[str, Any] = {"server-round": scenario.rounds, "first": True, "cut": cut, "r": even.rank}
    sent = [
        Message(RecordDict({"arrays": arrays, "config": ConfigRecord(dict(config))}), node_id, EXPORTED)
        for node_id in nodes
    ]
    losses = {}
    for message, reply in zip(sent, exchange(grid, sent), strict=True):
        name = nodes[message.metadata.dst_node_id].profile.name
        row = account_of(scenario, name, cost_of(message), reply, trains=False)
        journal.append("client_exported", round=scenario.rounds, client=name, **row)
        if row["status"] == "ok":
            losses[name] = row["loss"], row["weight"]
    if losses:
        journal.append("exported", round=scenario.rounds, asked=True, **(spread(losses) or {}))


def _wears_all(node: Node, final: GlobalAdapter, whole: LoraAdapter, scenario: Scenario) -> bool:
    """Whether what a client wears in its own evaluations is the whole adapter."""
    options = node.profile.options
    same = options.share == "all" and node.layers.modules.keys() == whole.modules.keys()
    return same and (scenario.folds or final.learned.rank <= options.r)


def _widest_cut(nodes: Iterable[Node]) -> str:
    """The smallest that holds the blocks of all."""
    cuts = [tuple(map(int, node.profile.options.cut.split(":"))) for node in nodes]
    return ":".join(str(max(sizes)) for sizes in zip(*cuts, strict=True))
