"""What a simulation shows while it runs: a live table of clients, or lines where no one watches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tightbeam.edge.report.units import bytes_text, joules_text, seconds_text
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.journal import moved_bytes, slow_clients

__all__ = ["FederationProgress"]

_SHOWN = 24  # clients in the table; of more, those that were active last
_AROUND = 6  # lines of a terminal that the table's rows leave free


@dataclass(slots=True)
class _Line:
    """One client."""

    group: str
    doing: str = ""
    loss: float | None = None
    eval_loss: float | None = None
    moved_bytes: int = 0
    joules: float = 0.0
    virtual_s: float = 0.0  # of the last round that it took part in
    active: int = 0


@dataclass
class FederationProgress:
    """Hears of every exchange and every row of the ledger."""

    scenario: Scenario
    console: Console
    lines: dict[str, _Line] = field(init=False)
    round: int = 0
    phase: str = "starting"
    replies: int = 0  # in this phase
    spent: str = ""  # of privacy

    def __post_init__(self) -> None:
        profiles = self.scenario.profiles()
        self._names = [profile.name for profile in profiles]
        self.lines = {profile.name: _Line(profile.group) for profile in profiles}
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._clock = 0
        self._took: dict[str, float] = {}  # virtual seconds of this round, by client

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def on_start(self, partition: int, message_type: str) -> None:
        """A client begins to work."""
        doing = {"train": "training", "evaluate": "evaluating"}.get(message_type, "")
        if doing == "training" and not self.phase.startswith(f"round {self.round + 1} "):
            self.phase, self.replies = f"round {self.round + 1} of {self.scenario.rounds}", 0
            self._took = {}
        elif doing == "evaluating" and not self.phase.startswith("evaluation"):
            self.phase, self.replies = f"evaluation after round {self.round}", 0
        line, self._clock = self.lines[self._names[partition]], self._clock + 1
        line.doing, line.active = doing, self._clock
        self._show()

    def on_reply(self, partition: int, metrics: Mapping[str, Any]) -> None:
        """A client is done; `metrics` have no steps when it failed."""
        line = self.lines[self._names[partition]]
        if line.doing == "training" and "loss" in metrics:
            line.loss = float(metrics["loss"])
        line.doing = "done" if "steps" in metrics else ""
        self.replies += 1
        self._show()

    def on_row(self, row: Mapping[str, Any]) -> None:
        """A row went into the ledger."""
        if row["row"] in ("client_round", "client_eval"):
            self._client(row)
        elif row["row"] == "round":
            self._end_of_round(row)
        elif row["row"] == "evaluation":
            self._evaluated(row)
        elif row["row"] == "joined":
            how = f"cannot join: {row['reason']}" if row["reason"] else "has joined"
            self._say(f"round {row['round']}: {row['client']} {how}")
        elif row["row"] == "no_evaluation":
            self._say(f"round {row['round']}: no evaluation: {row['reason']}")
        self._show()

    def table(self) -> Table:
        """The clients as they are now; it fits 80 columns."""
        grouped = any(line.group for line in self.lines.values())
        table = Table(title=self.title, title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("client", no_wrap=True)
        for name in ("group",) * grouped + ("now", "loss", "held out", "moved", "energy", "took"):
            table.add_column(name, justify="right", no_wrap=True)
        most = max(1, min(_SHOWN, self.console.height - _AROUND)) if self.console.is_terminal else _SHOWN
        shown = sorted(self.lines, key=lambda name: -self.lines[name].active)[:most]
        slow = slow_clients(self._took)
        for name in sorted(shown):
            line = self.lines[name]
            table.add_row(
                name,
                *(line.group,) * grouped,
                "slow" if name in slow and line.doing == "done" else line.doing,
                _number(line.loss),
                _number(line.eval_loss),
                bytes_text(line.moved_bytes),
                joules_text(line.joules),
                seconds_text(line.virtual_s) if line.virtual_s else "",
            )
        if len(shown) < len(self.lines):
            table.caption = f"{len(shown)} of {len(self.lines)} clients: those active last"
        return table

    @property
    def title(self) -> str:
        """Where the experiment is, and what it has cost so far."""
        moved, joules = self._sums()
        return f"{self.phase}: {self.replies} in; {bytes_text(moved)}, {joules_text(joules)}{self.spent}"

    def _client(self, row: Mapping[str, Any]) -> None:
        line = self.lines[row["client"]]
        line.moved_bytes += moved_bytes(row)
        line.joules += row.get("joules", 0.0)
        if row["status"] != "ok":
            line.doing = row["status"]
            self._say(f"round {row['round']}: {row['client']} {row['status']}: {row['reason']}")
        if row["row"] == "client_eval":
            line.eval_loss = row.get("loss", line.eval_loss)
        else:
            line.active = self._clock
            if row.get("virtual_s"):
                line.virtual_s = self._took[row["client"]] = row["virtual_s"]

    def _evaluated(self, row: Mapping[str, Any]) -> None:
        spread = f"mean of {row['clients']} clients"
        if row["worst"] is not None:
            spread = f"worst {row['worst']:.4f}, best {row['best']:.4f} of {row['clients']} clients"
        self._say(f"round {row['round']}: held-out loss {row['loss']:.4f} ({spread})")

    def _end_of_round(self, row: Mapping[str, Any]) -> None:
        self.round = row["round"]
        spent = "" if row.get("epsilon") is None else f", epsilon {row['epsilon']:.3f} at {row['delta']:g}"
        self.phase, self.spent = f"round {self.round} of {self.scenario.rounds} done", spent
        moved, joules = self._sums()
        so_far = f"{bytes_text(moved)}, {joules_text(joules)}{spent}"
        loss = "no update" if row["loss"] is None else f"loss {row['loss']:.4f}"
        self._say(
            f"round {self.round} of {self.scenario.rounds}: {row['updates']} updates, {loss}, "
            f"{seconds_text(row['virtual_s'])} virtual{self._waited_for()}; so far {so_far}"
        )

    def _waited_for(self) -> str:
        slow = slow_clients(self._took)
        if not slow:
            return ""
        more = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
        return f", waited for {max(slow, key=slow.__getitem__)}{more}"

    def _sums(self) -> tuple[int, float]:
        lines = self.lines.values()
        return sum(line.moved_bytes for line in lines), sum(line.joules for line in lines)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        if self._live.is_started:
            self._live.update(self.table())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
