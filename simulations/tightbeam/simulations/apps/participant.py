"""One client of a scenario inside one message: what it has, and its own connection to the cloud."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightbeam.common.costs.meter import JsonlLedger
from tightbeam.common.costs.rows import StepRow
from tightbeam.edge.connection import Cloud, connect
from tightbeam.edge.data import Example
from tightbeam.edge.federation import AdapterShape, Lender
from tightbeam.simulations.apps.settings import Settings
from tightbeam.simulations.scenario import ClientProfile, Scenario
from tightbeam.simulations.shards import client_files

__all__ = ["Client", "Leaving"]


class Leaving(Exception):  # noqa: N818  not an error of anybody
    """A client takes no part; the text says why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class Client:
    """One client in one message."""

    settings: Settings
    profile: ClientProfile
    node_config: dict[str, Any]

    @property
    def scenario(self) -> Scenario:
        """The experiment it takes part in."""
        return self.settings.scenario

    def shape(self) -> AdapterShape:
        """Its own cut and rank, with the adapter that all share."""
        adapter, options = self.scenario.adapter, self.profile.options
        targets = adapter.target_modules
        return AdapterShape(
            options.cut,
            options.mode,
            options.r,
            adapter.scale,
            adapter.dropout,
            "all-linear" if isinstance(targets, str) else tuple(targets),
        )

    def draw(self, what: str, number: int) -> random.Random:
        """Randomness of one event, the same on every runtime."""
        return random.Random(f"{self.scenario.seed}/{what}/{number}/{self.profile.name}")  # noqa: S311

    @contextmanager
    def cloud(self, run: str, rows: list[StepRow]) -> Iterator[Cloud]:
        """Open its own connection; the accounts of its steps go to `rows` and to its ledger."""
        identity = self.node_config.get("identity")
        if identity is None and self.settings.identities is not None:
            identity = self.settings.identities / self.profile.name
        others: list[dict[str, Any]] = []

        def on_row(row: dict[str, Any]) -> None:
            others.append(row)
            if row["row"] == "step":
                rows.append(StepRow.from_json(row))

        path = self.settings.folder / "clients" / self.profile.name / "ledger.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with connect(
                str(self.node_config.get("cloud", self.settings.address)),
                identity=identity,
                insecure=identity is None,
                name=self.profile.name,
                run=run,
                on_row=on_row,
                on_retry=lambda line: None,
            ) as cloud:
                yield cloud
        finally:
            with JsonlLedger(path) as ledger:
                for row in others:
                    ledger.append(row)

    def examples(self, cloud: Cloud, lender: Lender) -> tuple[list[Example], list[Example]]:
        """Give what it learns from, and what is held out."""
        own = self.node_config.get("train"), self.node_config.get("eval")
        if own[0] is not None and own[1] is not None:
            paths = Path(str(own[0])), Path(str(own[1]))
        else:
            paths = client_files(self.scenario, self.settings.folder, self.profile.name)
        data = self.scenario.data
        learn, test = (
            lender.examples(cloud, path, max_length=data.max_length, answer_only=data.answer_only)
            for path in paths
        )
        return learn, test
