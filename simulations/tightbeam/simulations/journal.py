"""What the server writes down: the ledger of an experiment, and the state that a killed one resumes from.

    ledger.jsonl              rows experiment, side, client_round, round, client_eval, evaluation
    state/round-N.safetensors the global adapter in float64, and what server optimizers remember
    state/round-N.json        written last: with it, round N is complete

A resumed experiment takes out the rows of the round that was cut off and does that round again; what it had
cost stays in the edges' ledgers and in the cloud's.
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

from tightbeam.common.costs.meter import JsonlLedger, read_ledger
from tightbeam.common.costs.prices import Prices
from tightbeam.common.errors import RecipeError, UsageError
from tightbeam.common.runs import atomic_write
from tightbeam.simulations.budgets import Spent
from tightbeam.simulations.scenario import Scenario

__all__ = ["Journal", "Row", "State", "moved_bytes", "slow_clients"]

Row = dict[str, Any]
Listener = Callable[[Row], None]
_KEEP = 2
_SLOW = 1.5  # times the median of its round


def moved_bytes(row: Mapping[str, Any]) -> int:
    """Bytes on all wires of one client's row: steps, adapters, weights."""
    names = ("wire_up_bytes", "wire_down_bytes", "weight_bytes", "adapter_up_bytes", "adapter_down_bytes")
    return sum(int(row.get(name, 0)) for name in names)


def slow_clients(took_s: Mapping[str, float]) -> dict[str, float]:
    """Which of a round's clients took over 1.5 times its median, and how many times; virtual seconds."""
    if not took_s:
        return {}
    usual_s = statistics.median(took_s.values())
    return {name: took / usual_s for name, took in took_s.items() if took > _SLOW * usual_s}


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """An experiment after `round` rounds."""

    round: int
    arrays: dict[str, NDArray[np.floating[Any]]]


class Journal:
    """The ledger and the states of one experiment's folder."""

    def __init__(self, folder: Path, scenario: Scenario, listener: Listener = lambda row: None) -> None:
        self._folder, self._scenario, self._listener = folder, scenario, listener
        self._prices = Prices()
        self.rows: list[Row] = []

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return self._folder / "ledger.jsonl"

    def begin(self, *, resume: bool) -> State | None:
        """Open the ledger; the last complete state when resuming, if there is one.

        Raises:
            RecipeError: the folder holds another experiment, or one that should not be resumed.
            UsageError: there is nothing to resume.

        """
        if not resume:
            if self.ledger.exists():
                raise RecipeError(
                    f"{self._folder} already holds an experiment.",
                    cure="Add --resume to go on with it, or give another output.name.",
                )
            self._rewrite([])
            return None
        if not self.ledger.exists():
            raise UsageError(
                f"{self._folder} holds no experiment to resume.", cure="Leave --resume out to start one."
            )
        rows = read_ledger(self.ledger)
        self._require_same(rows)
        done = self._last_round()
        self.rows = [row for row in rows if row["row"] == "experiment" or row.get("round", 0) <= done]
        self._rewrite(self.rows)
        for row in self.rows:
            self._listener(row)
        return None if done < 0 else State(done, load_file(self._state(done)))

    def append(self, kind: str, **values: Any) -> Row:
        """Write one row."""
        row = {"row": kind, **values, "time_unix_s": time.time()}
        self.rows.append(row)
        with JsonlLedger(self.ledger) as ledger:
            ledger.append(row)
        self._listener(row)
        return row

    def save(self, state: State) -> None:
        """Make `state` what a killed experiment resumes from."""
        atomic_write(self._state(state.round), save(dict(state.arrays)))
        atomic_write(self._state(state.round).with_suffix(".json"), json.dumps({"round": state.round}) + "\n")
        for path in (self._folder / "state").glob("round-*"):
            if int(path.stem.removeprefix("round-")) <= state.round - _KEEP:
                path.unlink()

    def of_client(self, name: str, *kinds: str) -> list[Row]:
        """A client's rows, of these kinds."""
        return [row for row in self.rows if row["row"] in kinds and row.get("client") == name]

    def spent(self, name: str) -> Spent:
        """What a client has spent so far."""
        rows = self.of_client(name, "client_round", "client_eval")
        moved, joules = sum(map(moved_bytes, rows)), sum(row.get("joules", 0.0) for row in rows)
        flops = sum(row.get("cloud_flops", 0) for row in rows)
        bill = self._prices.bill(wire_bytes=moved, cloud_flops=flops, edge_joules=joules)
        return Spent(moved / 1e6, joules, bill.total)

    def _state(self, number: int) -> Path:
        return self._folder / "state" / f"round-{number}.safetensors"

    def _last_round(self) -> int:
        found = (self._folder / "state").glob("round-*.json")
        return max((int(path.stem.removeprefix("round-")) for path in found), default=-1)

    def _require_same(self, rows: list[Row]) -> None:
        first = next((row for row in rows if row["row"] == "experiment"), None)
        if first is None:
            return
        old, new = first["scenario"], self._scenario.numbers()
        # as text: which group comes first decides who is in it
        changed = [key for key in new if json.dumps(old.get(key)) != json.dumps(new[key])]
        if changed:
            raise RecipeError(
                f"{self._folder} was started with another {', '.join(changed)}.",
                cure="Resume with the same scenario, or give another output.name.",
            )

    def _rewrite(self, rows: list[Row]) -> None:
        text = "".join(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows)
        atomic_write(self.ledger, text)
