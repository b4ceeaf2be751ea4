"""What the server writes down: the ledger of an experiment, and the state that a killed one resumes from.

    ledger.jsonl              rows experiment, changed, side, client_round, round, client_eval, evaluation,
                              client_exported, exported
    state/round-N.safetensors the global adapter in float64, and what server optimizers remember
    state/round-N.json        written last: with it, round N is complete

A resumed experiment does the round that was cut off again. What that had cost stays: rows of clients are kept
with the status `cut off`, and each client is asked what it did beyond the last row that was written.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from tightbeam.common.errors import UsageError
from tightbeam.common.files import atomic_write
from tightbeam.edge.report.meter import JsonlLedger, read_ledger
from tightbeam.federation.contract.budgets import Spent
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.pricing import money_of, moved_bytes, with_offers
from tightbeam.federation.server.resuming import changes, scenario_told

__all__ = ["CUT_OFF", "Journal", "Row", "State", "moved_bytes", "require_unused", "slow_clients"]

Row = dict[str, Any]
Listener = Callable[[Row], None]
CUT_OFF: Row = {"status": "cut off", "reason": "The server stopped in this round; it was done again."}
"""Of work that counts in the accounts alone."""
_WORK = ("client_round", "client_eval")
_KEEP = 2
_SLOW = 1.5  # times the median of its round


def slow_clients(took_s: Mapping[str, float]) -> dict[str, float]:
    """Which of a round's clients took over 1.5 times its median, and how many times; virtual seconds."""
    if not took_s:
        return {}
    usual_s = statistics.median(took_s.values())
    return {name: took / usual_s for name, took in took_s.items() if took > _SLOW * usual_s}


def require_unused(folder: Path) -> None:
    """Refuse a folder with an experiment that has begun; a start that came to nothing leaves no rows.

    Raises:
        UsageError: it has one.

    """
    ledger = folder / "ledger.jsonl"
    if ledger.exists() and read_ledger(ledger):
        raise UsageError(
            f"{folder} already holds an experiment.",
            cure="Add --resume to go on with it (resume=true in a run config), or give another output.name.",
        )


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """An experiment after `round` rounds."""

    round: int
    arrays: dict[str, NDArray[np.floating[Any]]]


class Journal:
    """The ledger and the states of one experiment's folder."""

    def __init__(self, folder: Path, scenario: Scenario, listener: Listener = lambda row: None) -> None:
        self._folder, self._scenario, self._listener = folder, scenario, listener
        self.rows: list[Row] = []
        self._by_client: dict[str, list[Row]] = {}
        self.unheard: set[str] = set()  # clients that may have done more than this ledger says

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return self._folder / "ledger.jsonl"

    def begin(self, *, resume: bool) -> State | None:
        """Open the ledger; the last complete state when resuming, if there is one.

        Raises:
            RecipeError: it was started with other values of what may not change.
            UsageError: the folder holds an experiment that should not be resumed, or none to resume.

        """
        if not resume:
            require_unused(self._folder)
            return None
        rows = read_ledger(self.ledger) if self.ledger.exists() else []
        if not rows:
            raise UsageError(
                f"{self._folder} holds no experiment to resume.", cure="Leave --resume out to start one."
            )
        done = self._last_round()
        new, old = self._scenario.numbers(), scenario_told(rows)
        changed = changes(self._folder, old, new, done) if old else []
        for row in rows:
            if row["row"] == "experiment" or row.get("round", 0) <= done:
                self._take(row)
            elif row["row"] in _WORK:
                self._take(row | CUT_OFF)
        self._rewrite(self.rows)
        self.unheard = {profile.name for profile in self._scenario.profiles()}
        if changed:
            self.append("changed", round=max(done, 0), changes=changed, scenario=new)
        return None if done < 0 else State(done, load_file(self._state(done)))

    def _take(self, row: Row) -> None:
        self.rows.append(row)
        if row["row"] in _WORK:
            self._by_client.setdefault(row["client"], []).append(row)
        self._listener(row)

    def append(self, kind: str, **values: Any) -> Row:
        """Write one row."""
        row = {"row": kind, **values, "time_unix_s": time.time()}
        self._folder.mkdir(parents=True, exist_ok=True)
        with JsonlLedger(self.ledger) as ledger:
            ledger.append(row)
        self._take(row)
        return row

    def save(self, state: State) -> None:
        """Make `state` what a killed experiment resumes from."""
        atomic_write(self._state(state.round), save(dict(state.arrays)))
        atomic_write(self._state(state.round).with_suffix(".json"), json.dumps({"round": state.round}) + "\n")
        for path in (self._folder / "state").glob("round-*"):
            if int(path.stem.removeprefix("round-")) <= state.round - _KEEP:
                path.unlink()

    def of_client(self, name: str) -> list[Row]:
        """What a client did, in rounds and evaluations."""
        return self._by_client.get(name, [])

    def left(self) -> set[str]:
        """Clients that have left; after a change of the scenario they are asked again."""
        found = set[str]()
        for row in self.rows:
            if row["row"] == "changed":
                found.clear()
            elif row.get("status") == "left":
                found.add(row["client"])
        return found

    def spent(self, name: str) -> Spent:
        """What a client has spent so far."""
        rows = with_offers(self.of_client(name))
        moved, joules = sum(map(moved_bytes, rows)), sum(row.get("joules", 0.0) for row in rows)
        return Spent(moved / 1e6, joules, money_of(rows))

    def _state(self, number: int) -> Path:
        return self._folder / "state" / f"round-{number}.safetensors"

    def _last_round(self) -> int:
        found = (self._folder / "state").glob("round-*.json")
        return max((int(path.stem.removeprefix("round-")) for path in found), default=-1)

    def _rewrite(self, rows: list[Row]) -> None:
        text = "".join(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows)
        atomic_write(self.ledger, text)
