"""One client of a scenario inside one message: what it has, and its own connection to the cloud."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightbeam.common.config import Codecs
from tightbeam.common.costs.meter import JsonlLedger
from tightbeam.common.costs.rows import StepRow
from tightbeam.common.errors import UpdateRefusedError
from tightbeam.common.federation import Arrays
from tightbeam.edge.connection import Cloud, connect
from tightbeam.edge.data import Example
from tightbeam.edge.federation import AdapterShape, CachePlace, Lender, SplitAdapter, Workplace, pad_id
from tightbeam.simulations.apps.personal import PersonalPart
from tightbeam.simulations.apps.settings import Settings
from tightbeam.simulations.global_adapter import fresh, layers_of
from tightbeam.simulations.scenario import ClientProfile, Scenario
from tightbeam.simulations.shaping import ShapedLine, require_local
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
    rows: list[StepRow] = field(default_factory=list)  # accounts of its steps in this message

    @property
    def scenario(self) -> Scenario:
        """The experiment it takes part in."""
        return self.settings.scenario

    @property
    def folder(self) -> Path:
        """Its own files."""
        return self.settings.folder / "clients" / self.profile.name

    @property
    def answered(self) -> Path:
        """Which adapters it has answered in secure rounds: with its own identity, not where the run says."""
        if own := self.node_config.get("answered"):
            return Path(str(own))
        return Path(str(self.node_config.get("identity", self.folder))) / "answered"

    @property
    def personal(self) -> PersonalPart:
        """What it keeps to itself between rounds."""
        return PersonalPart(self.folder / "personal")

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
            options.side if options.mode == "side" else None,
        )

    def frozen_after(self, number: int) -> bool:
        """Whether nothing below its cut changes any more once round `number` is over."""
        freeze = self.scenario.train.freeze_bottom_after
        return freeze is not None and number >= freeze

    def workplace(self, cloud: Cloud, lender: Lender, codec: Codecs, *, frozen: bool) -> Workplace:
        """Its model with steps of this codec, and its cache."""
        return Workplace(
            lent=lender.lend(cloud, self.shape(), codec),
            shape=self.shape(),
            fingerprint=cloud.card.fingerprint,
            pad_id=pad_id(lender.tokenizer(cloud)),
            cache=CachePlace(self.folder / "cache", cloud.cache_secret, self.profile.options.cache_gb),
            frozen=frozen,
        )

    def complete(self, lent: SplitAdapter, shared: Arrays, number: int) -> Arrays:
        """What it wears at the start of round `number`: what it was sent, and its own part.

        Raises:
            UpdateRefusedError: it was sent something that it does not share.

        """
        names = lent.shared(self.profile.options.share)
        if foreign := sorted(shared.keys() - names):
            raise UpdateRefusedError(
                f"The global adapter does not fit: {foreign[0]} is not what {self.profile.name} shares.",
                cure="Server and client must run the same scenario on the same backbone.",
            )
        if names == lent.layers().keys():
            return shared
        own = self.personal.before(number)
        if own is None:
            start = fresh(layers_of(lent.layers(), self.profile.name), self.shape().r, self.scenario.seed)
            own = {n: a for n, a in start.state(self.shape().scale).items() if n not in names}
        return {**own, **shared}

    def draw(self, what: str, number: int) -> random.Random:
        """Randomness of one event, the same on every runtime."""
        return random.Random(f"{self.scenario.seed}/{what}/{number}/{self.profile.name}")  # noqa: S311

    @contextmanager
    def cloud(self, run: str) -> Iterator[Cloud]:
        """Open its own connection; the accounts of its steps go to `rows` and to its ledger."""
        identity = self.node_config.get("identity")
        if identity is None and self.settings.identities is not None:
            identity = self.settings.identities / self.profile.name
        others: list[dict[str, Any]] = []

        def on_row(row: dict[str, Any]) -> None:
            others.append(row)
            if row["row"] == "step":
                self.rows.append(StepRow.from_json(row))

        path = self.folder / "ledger.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        address = str(self.node_config.get("cloud", self.settings.address))
        try:
            with (
                self._line(address) as reached,
                connect(
                    reached,
                    identity=identity,
                    insecure=identity is None,
                    name=self.profile.name,
                    run=run,
                    on_row=on_row,
                    on_retry=lambda line: None,
                ) as cloud,
            ):
                yield cloud
        finally:
            with JsonlLedger(path) as ledger:
                for row in others:
                    ledger.append(row)

    @contextmanager
    def _line(self, address: str) -> Iterator[str]:
        """Where to reach the cloud: at its address, or through a line as slow as the profile says."""
        if self.settings.shape:
            require_local(address)
            with ShapedLine(address, self.profile.options.network) as line:
                yield line.address
        else:
            yield address

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
