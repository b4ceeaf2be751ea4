"""The server's side: who is there, where the adapter starts, the rounds, and what is left at the end.

The server needs no backbone and no way to the cloud: names and shapes of the adapter come from one client of
each cut. A state is saved after every round, so a killed server goes on from the last one.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from tightbeam.common.errors import FederationError
from tightbeam.edge.side import SidePlan
from tightbeam.federation.contract.records import from_record, to_record
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.math import LoraAdapter
from tightbeam.federation.server.exchange import exchange
from tightbeam.federation.server.exported import evaluate_exported
from tightbeam.federation.server.global_adapter import GlobalAdapter
from tightbeam.federation.server.journal import Journal, State
from tightbeam.federation.server.roster import Roster
from tightbeam.federation.server.saving import save_global_adapter
from tightbeam.federation.server.strategy import FederatedLora

__all__ = ["app", "main", "run_rounds"]

app = ServerApp()
_STATE, _MEMORY = "global/", "memory/"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario in the run config."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    run = RunConfig.of(context.run_config)
    # The in-process grid brings a listener for its live table; on the other runtimes nobody listens.
    listener: Callable[[dict[str, Any]], None] = getattr(grid, "listener", lambda row: None)
    journal = Journal(run.folder, run.scenario, listener)
    state = journal.begin(resume=run.resume)
    roster = Roster(grid, run.scenario)
    nodes = roster.gather()
    if not any(row["row"] == "experiment" for row in journal.rows):
        told = {"scenario": run.scenario.numbers(), "backbone": roster.facts, "shaped": run.shape}
        journal.append("experiment", **told)
    for name, reason in roster.lost().items():
        journal.append("joined", round=state.round if state else 0, client=name, reason=reason)
    _note_sides(journal, roster)
    strategy = FederatedLora(run.scenario, nodes, journal, roster.facts["fingerprint"])
    final = run_rounds(strategy, grid, state, roster)
    if final.learned.modules:
        place, scale = run.folder / "adapter", run.scenario.adapter.scale
        sides = {row["name"]: SidePlan.of(row["facts"]) for row in journal.rows if row["row"] == "side"}
        save_global_adapter(place, final, scale, roster.facts["model"], sides)
        evaluate_exported(strategy, grid, final)


def run_rounds(strategy: FederatedLora, grid: Grid, state: State | None, roster: Roster) -> GlobalAdapter:
    """All rounds that are left to do; the last global adapter.

    Raises:
        CohortError: see `FederatedLora.aggregate_train`.
        FederationError: every client has left.

    """
    scenario = strategy.scenario
    if state is None:
        arrays = to_record(_fresh(roster).arrays())
        _evaluate(strategy, grid, 0, arrays)
        _save(strategy, 0, arrays)
        done = 0
    else:
        done = state.round
        arrays = to_record(_part(state, _STATE))
        strategy.remember(_part(state, _MEMORY))
    for number in range(done + 1, scenario.rounds + 1):
        arrays = _welcome(strategy, number, roster, arrays)
        if not strategy.present():
            raise _nobody_left(strategy.journal, number)
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        replies = exchange(grid, messages)
        aggregated, _ = strategy.aggregate_train(number, replies)
        arrays = aggregated or arrays
        _evaluate(strategy, grid, number, arrays)
        _save(strategy, number, arrays)
    if not any(row["row"] == "round" and row["updates"] for row in strategy.journal.rows):
        raise FederationError(
            f"None of {scenario.rounds} rounds had an update{_why(strategy.journal)}",
            cure="Correct that, then go on with --resume and more rounds.",
        )
    return GlobalAdapter.from_arrays(from_record(arrays))


def _nobody_left(journal: Journal, number: int) -> FederationError:
    """Everybody has left: for want of money, which can be had, or of memory."""
    cure = "Take devices with more memory, or a lower rank, under another output.name."
    if any(str(row.get("reason")).startswith("Its budget") for row in journal.rows):
        cure = "Raise client.budget, or that of the groups, and go on with --resume."
    return FederationError(f"Every client has left before round {number}{_why(journal)}", cure=cure)


def _why(journal: Journal) -> str:
    """The last complaint of a client."""
    last = [row for row in journal.rows if row["row"] == "client_round" and row["reason"]][-1:]
    return "".join(f": {row['client']} says: {row['reason']}" for row in last) or "."


def _fresh(roster: Roster) -> GlobalAdapter:
    """Where the layers of all that are there begin."""
    rank = max(profile.options.r for profile in roster.scenario.profiles())
    layers = [node.layers for node in roster.nodes.values()]
    return GlobalAdapter.initial(layers, rank, roster.scenario.seed)


def _welcome(strategy: FederatedLora, number: int, roster: Roster, arrays: ArrayRecord) -> ArrayRecord:
    """Let those in who came since the last round; their own layers begin afresh, shared ones go on."""
    admitted, refused = roster.newcomers()
    for who, reason in refused.items():
        strategy.journal.append("joined", round=number, client=who, reason=reason)
    if not admitted:
        return arrays
    strategy.admit(admitted)
    _note_sides(strategy.journal, roster)
    for node in admitted:
        strategy.journal.append("joined", round=number, client=node.profile.name, reason="")
    begin, now = _fresh(roster), GlobalAdapter.from_arrays(from_record(arrays))
    modules = {**begin.learned.modules, **now.learned.modules}
    rest = {**begin.learned.rest, **now.learned.rest}
    return to_record(replace(now, learned=LoraAdapter(modules, rest)).arrays())


def _note_sides(journal: Journal, roster: Roster) -> None:
    """Keep what the ladders were built for: at the end, after a kill, those who know it may be gone."""
    known = {row["name"] for row in journal.rows if row["row"] == "side"}
    for name in sorted(roster.sides.keys() - known):
        journal.append("side", name=name, facts=roster.sides[name])


def _evaluate(strategy: FederatedLora, grid: Grid, number: int, arrays: ArrayRecord) -> None:
    if messages := strategy.configure_evaluate(number, arrays, ConfigRecord(), grid):
        strategy.aggregate_evaluate(number, exchange(grid, messages))


def _save(strategy: FederatedLora, number: int, arrays: ArrayRecord) -> None:
    found = {_STATE + name: array for name, array in from_record(arrays).items()}
    found |= {_MEMORY + name: array for name, array in strategy.memory().items()}
    strategy.journal.save(State(number, found))


def _part(state: State, prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): array for n, array in state.arrays.items() if n.startswith(prefix)}
