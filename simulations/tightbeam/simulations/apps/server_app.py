"""The server's side: who is there, where the adapter starts, the rounds, and what is left at the end.

The server needs no backbone and no way to the cloud: names and shapes of the adapter come from one client of
each cut. A state is saved after every round, so a killed server goes on from the last one.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from tightbeam.common.errors import FederationError
from tightbeam.common.federation import LoraAdapter
from tightbeam.simulations.apps.settings import Settings
from tightbeam.simulations.apps.strategy import FederatedLora, Node, failure_of
from tightbeam.simulations.global_adapter import GlobalAdapter, from_record, layers_of, to_record
from tightbeam.simulations.journal import Journal, State
from tightbeam.simulations.saving import save_global_adapter
from tightbeam.simulations.scenario import ClientProfile, Scenario

__all__ = ["app", "main", "run_rounds"]

app = ServerApp()
_NODES_S = 600.0  # how long all clients may take to come up
_ANSWER_S = 7200.0  # how long a client may take for a round
_STATE, _MEMORY = "global/", "memory/"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario in the run config."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    settings = Settings.of(context.run_config)
    # The in-process grid brings a listener for its live table; on the other runtimes nobody listens.
    listener: Callable[[dict[str, Any]], None] = getattr(grid, "listener", lambda row: None)
    journal = Journal(settings.folder, settings.scenario, listener)
    state = journal.begin(resume=settings.resume)
    nodes, facts = _roster(grid, settings.scenario)
    if not any(row["row"] == "experiment" for row in journal.rows):
        journal.append("experiment", scenario=settings.scenario.numbers(), backbone=facts)
    strategy = FederatedLora(settings.scenario, nodes, journal)
    final = run_rounds(strategy, grid, state, [node.layers for node in nodes])
    if final.learned.modules:
        save_global_adapter(
            settings.folder / "adapter", final, settings.scenario.adapter.scale, facts["model"]
        )


def run_rounds(
    strategy: FederatedLora, grid: Grid, state: State | None, layers: Sequence[LoraAdapter]
) -> GlobalAdapter:
    """All rounds that are left to do; the last global adapter.

    Raises:
        CohortError: see `FederatedLora.aggregate_train`.
        FederationError: every client has left.

    """
    scenario = strategy.scenario
    if state is None:
        rank = max(profile.options.r for profile in scenario.profiles())
        arrays = to_record(GlobalAdapter.initial(layers, rank, scenario.seed).arrays())
        _evaluate(strategy, grid, 0, arrays)
        _save(strategy, 0, arrays)
        done = 0
    else:
        done = state.round
        arrays = to_record(_part(state, _STATE))
        strategy.combiner.remember(_part(state, _MEMORY))
    for number in range(done + 1, scenario.rounds + 1):
        if not strategy.present():
            raise FederationError(
                f"Every client has left before round {number}.", cure="Raise the clients' budgets."
            )
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        replies = grid.send_and_receive(messages, timeout=_ANSWER_S)
        aggregated, _ = strategy.aggregate_train(number, replies)
        arrays = aggregated or arrays
        _evaluate(strategy, grid, number, arrays)
        _save(strategy, number, arrays)
    return GlobalAdapter.from_arrays(from_record(arrays))


def _evaluate(strategy: FederatedLora, grid: Grid, number: int, arrays: ArrayRecord) -> None:
    messages = list(strategy.configure_evaluate(number, arrays, ConfigRecord(), grid))
    if messages:
        strategy.aggregate_evaluate(number, grid.send_and_receive(messages, timeout=_ANSWER_S))


def _save(strategy: FederatedLora, number: int, arrays: ArrayRecord) -> None:
    found = {_STATE + name: array for name, array in from_record(arrays).items()}
    found |= {_MEMORY + name: array for name, array in strategy.combiner.memory().items()}
    strategy.journal.save(State(number, found))


def _part(state: State, prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): array for n, array in state.arrays.items() if n.startswith(prefix)}


def _roster(grid: Grid, scenario: Scenario) -> tuple[list[Node], dict[str, Any]]:
    """Every client with its layers, and what backbone they have."""
    ids = _wait_for_nodes(grid, scenario.clients)
    told_by = {str(_notes(reply)["client"]): reply for reply in _ask(grid, "query.hello", ids)}
    names = {name: reply.metadata.src_node_id for name, reply in told_by.items()}
    profiles = [profile for profile in scenario.profiles() if profile.name in names]
    first: dict[tuple[object, ...], ClientProfile] = {}
    for profile in profiles:
        first.setdefault(profile.options.place, profile)
    layers, below, facts = {}, {}, dict[str, Any]()
    for place, profile in first.items():
        (reply,) = _ask(grid, "query.layers", [names[profile.name]])
        told = json.loads(str(reply.content.config_records["notes"]["layers"]))
        layers[place] = layers_of(told["shapes"], profile.name)
        below[place] = frozenset(told["below"])
        facts = facts or told["backbone"]
        if facts["fingerprint"] != told["backbone"]["fingerprint"]:
            raise FederationError(
                f"{profile.name} has another backbone than the clients before it.",
                cure="Connect all clients to clouds of one backbone.",
            )
    nodes = []
    for profile in profiles:
        name, place = profile.name, profile.options.place
        nodes.append(Node(names[name], profile, _certificate(told_by[name]), layers[place], below[place]))
    if scenario.train.freeze_bottom_after is not None:
        _require_one_side_of_the_cut(nodes)
    return nodes, facts


def _require_one_side_of_the_cut(nodes: Iterable[Node]) -> None:
    """A layer that some keep frozen below their cut must not go on learning above that of others."""
    below = {layer: node.profile.name for node in nodes for layer in node.below}
    for node in nodes:
        for layer in sorted((below.keys() & node.layers.modules) - node.below):
            raise FederationError(
                f"{layer} is below the cut of {below[layer]} and above that of {node.profile.name}, so it "
                "cannot be frozen.",
                cure="Choose cuts that do not overlap, or leave train.freeze_bottom_after out.",
            )


def _wait_for_nodes(grid: Grid, wanted: int) -> list[int]:
    deadline_s = time.monotonic() + _NODES_S
    while len(ids := list(grid.get_node_ids())) < wanted:
        if time.monotonic() > deadline_s:
            raise FederationError(
                f"{len(ids)} of {wanted} clients are there after {_NODES_S:.0f} s.",
                cure="Start one node per client of the scenario, or lower clients.",
            )
        time.sleep(0.5)
    return ids


def _ask(grid: Grid, message_type: str, ids: Iterable[int]) -> list[Message]:
    """Replies to an empty message; the first complaint is raised."""
    messages = [Message(RecordDict({"config": ConfigRecord()}), node_id, message_type) for node_id in ids]
    replies = list(grid.send_and_receive(messages, timeout=_ANSWER_S))
    for failure in map(failure_of, replies):
        if failure is not None:
            raise failure
    return replies


def _notes(reply: Message) -> ConfigRecord:
    return reply.content.config_records["notes"]


def _certificate(reply: Message) -> bytes:
    value = _notes(reply).get("certificate", b"")
    return value if isinstance(value, bytes) else b""
