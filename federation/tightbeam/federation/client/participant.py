"""One client of a federation inside one message: what it has, and its own connection to the cloud."""

import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightbeam.common.accounts.prices import PriceList
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.errors import CloudUnavailableError, UpdateRefusedError
from tightbeam.edge.data import Example
from tightbeam.edge.link.connection import Cloud, connect
from tightbeam.edge.recipe import Codecs
from tightbeam.edge.report.meter import JsonlLedger, read_ledger
from tightbeam.federation.client import AdapterShape, CachePlace, Lender, SplitAdapter, Workplace, pad_id
from tightbeam.federation.client.node_config import NodeSection, node_section
from tightbeam.federation.client.personal import PersonalPart
from tightbeam.federation.client.surroundings import RealSurroundings, Surroundings
from tightbeam.federation.contract.layers import fresh, layers_of
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.math import Arrays
from tightbeam.federation.scenario import ClientProfile, Scenario

__all__ = ["Client", "Leaving"]

_log = logging.getLogger(__name__)
_ASK_AGAIN_S = 10.0
_AWAY_S: dict[str, float] = {}  # when this process last gave up on a cloud, by its address


class Leaving(Exception):  # noqa: N818  not an error of anybody
    """A client takes no part; the text says why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@contextmanager
def _noting_away(address: str) -> Iterator[None]:
    """Have one client of this process wait for a cloud that is away, and not each of them in turn.

    Raises:
        CloudUnavailableError: another one has just waited in vain.

    """
    if time.monotonic() - _AWAY_S.get(address, -math.inf) < _ASK_AGAIN_S:
        raise CloudUnavailableError(f"The cloud at {address} was away a moment ago.")
    try:
        yield
    except CloudUnavailableError:
        _AWAY_S[address] = time.monotonic()
        raise


@dataclass(frozen=True, slots=True)
class Client:
    """One client in one message."""

    run_config: RunConfig
    profile: ClientProfile
    node_config: dict[str, Any]
    rows: list[StepRow] = field(default_factory=list)  # accounts of its steps in this message
    missed: list[StepRow] = field(default_factory=list)  # those of which the server has not heard
    prices: list[PriceList] = field(default_factory=list)  # that its cloud asks for, once it is connected
    surroundings: Surroundings = field(default_factory=RealSurroundings)

    @property
    def scenario(self) -> Scenario:
        """The experiment it takes part in."""
        return self.run_config.scenario

    @property
    def node(self) -> NodeSection:
        """What its node was started with; raises as `node_section`."""
        return node_section(self.node_config, self.run_config)

    @property
    def folder(self) -> Path:
        """Its own files."""
        return self.run_config.folder / "clients" / self.profile.name

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

    def adapter_shape(self) -> AdapterShape:
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
            options.own_side,
        )

    def frozen_after(self, number: int) -> bool:
        """Whether nothing below its cut changes any more once round `number` is over."""
        freeze = self.scenario.train.freeze_bottom_after
        return freeze is not None and number >= freeze

    def workplace(
        self, cloud: Cloud, lender: Lender, codec: Codecs, *, frozen: bool, shape: AdapterShape | None = None
    ) -> Workplace:
        """Its model with steps of this codec, and its cache; of its own shape if no other is given."""
        shape = shape or self.adapter_shape()
        return Workplace(
            lent=lender.lend(cloud, shape, codec),
            shape=shape,
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
            start = fresh(
                layers_of(lent.layers(), self.profile.name), self.adapter_shape().r, self.scenario.seed
            )
            own = {n: a for n, a in start.state(self.adapter_shape().scale).items() if n not in names}
        return {**own, **shared}

    def draw(self, what: str, number: int) -> random.Random:
        """Randomness of one event, the same on every runtime."""
        return random.Random(f"{self.scenario.seed}/{what}/{number}/{self.profile.name}")  # noqa: S311

    @contextmanager
    def cloud(self, run: str) -> Iterator[Cloud]:
        """Open its own connection; the accounts of its steps go to `rows` and to its ledger."""
        run_config, own = self.run_config, self.node
        identity, address = own.identity, own.cloud or run_config.address
        if identity is None and run_config.identities is not None:
            identity = run_config.identities / self.profile.name
        self.folder.mkdir(parents=True, exist_ok=True)
        with JsonlLedger(self._ledger) as ledger:

            def on_row(row: dict[str, Any]) -> None:
                ledger.append(row)  # at once: what a killed client has moved was moved
                if row["row"] == "step":
                    self.rows.append(StepRow.from_json(row))

            with (
                _noting_away(address),
                self.surroundings.line(self, address) as reached,
                connect(
                    reached,
                    identity=identity,
                    insecure=identity is None,
                    name=self.profile.name,
                    run=run,
                    on_row=on_row,
                    on_retry=lambda line: _log.warning("%s: %s", self.profile.name, line),
                ) as cloud,
            ):
                self.prices[:] = [] if cloud.prices is None else [cloud.prices]
                yield cloud

    @property
    def _ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    def recall(self, run: str) -> None:
        """Find the steps after those of `run`, the last that a resumed server knows of."""
        rows = read_ledger(self._ledger) if self._ledger.exists() else []
        steps = [StepRow.from_json(row) for row in rows if row["row"] == "step"]
        known = max((number for number, row in enumerate(steps, 1) if row.run == run), default=0)
        self.missed.extend(steps[known:])

    def examples(self, cloud: Cloud, lender: Lender) -> tuple[list[Example], list[Example]]:
        """Give what it learns from, and what is held out."""
        data, paths = self.scenario.data, self.surroundings.texts(self)
        learn, test = (
            lender.examples(cloud, path, max_length=data.max_length, answer_only=data.answer_only)
            for path in paths
        )
        return learn, test
