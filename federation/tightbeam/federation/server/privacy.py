"""Differential privacy by Flower: its clipping strategies and mods, and its accountant.

What is protected is a whole client: whether it took part, whatever its texts, changes what anybody can learn
from the published adapters by no more than epsilon and delta say. Every published round costs.

    at the server, fixed or adaptive     the server clips and adds noise; it must be trusted
    at the client, fixed or adaptive     Flower's mods clip at the node; the server adds the noise
    at the client, in secure rounds      the node clips and adds its part; the server never sees a sum without

Epsilon is what Flower's accountant says without amplification by sampling: our samples are drawn from the
scenario's seed, and who knows it knows who was in a round. docs/federation-math.md states the assumptions.
"""

from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant
from numpy.typing import NDArray

from tightbeam.federation.requirements import missing
from tightbeam.federation.scenario import PrivacySection, Scenario

__all__ = [
    "Accounting",
    "Adaptive",
    "Chosen",
    "Fixed",
    "adaptive_multiplier",
    "private_strategy",
]

Fixed = DifferentialPrivacyServerSideFixedClipping | DifferentialPrivacyClientSideFixedClipping
Adaptive = DifferentialPrivacyServerSideAdaptiveClipping | DifferentialPrivacyClientSideAdaptiveClipping
_MULTIPLIERS = "multipliers"


class Accounting:
    """What all published rounds have cost so far; Flower's strategies add to `accountant` themselves."""

    def __init__(self, scenario: Scenario, section: PrivacySection) -> None:
        """Start with nothing published.

        Raises:
            UsageError: Flower's accountant is not installed.

        """
        self.section = section
        self._sampled, self._population = scenario.sampled, scenario.clients
        config = PrivacyConfig(
            target_delta=section.delta,
            population_size=scenario.clients,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
        )
        try:
            self.accountant = RdpAccountant(config)
        except ImportError as error:
            raise missing("strategy.privacy needs Flower's accountant.", "privacy") from error

    def release(self, noise_multiplier: float) -> None:
        """Count one published round; the multiplier is the noise over what one client can change."""
        self.accountant.compose(GaussianPrivacyEvent(noise_multiplier, self._sampled, self._population))

    @property
    def epsilon(self) -> float:
        """Epsilon at the scenario's delta, of everything published so far."""
        if not self.accountant.num_releases:
            return 0.0
        return self.accountant.get_privacy_spent().epsilon

    def memory(self) -> dict[str, NDArray[np.float64]]:
        """What must survive a restart: the multiplier of each published round."""
        state: Any = self.accountant.state_dict()
        multipliers = [
            one["event"]["noise_multiplier"] for one in state["compositions"] for _ in range(one["count"])
        ]
        return {_MULTIPLIERS: np.array(multipliers, np.float64)}

    def remember(self, memory: dict[str, NDArray[Any]]) -> None:
        """Go on after a restart. The round that was cut off may have reached clients: it counts, too."""
        for multiplier in memory.get(_MULTIPLIERS, ()):
            self.release(float(multiplier))
        self.release(self.section.noise_multiplier)


class Chosen(FedAvg):
    """FedAvg over clients that somebody else has sampled; Flower's accounting wants to count messages."""

    def __init__(self) -> None:
        super().__init__(weighted_by_key="weight")
        self.num_chosen = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: Any, grid: Grid
    ) -> list[Message]:
        """As many messages as were chosen; they are not sent."""
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, 1, MessageType.TRAIN)] * self.num_chosen


def private_strategy(scenario: Scenario, accounting: Accounting) -> Fixed | Adaptive:
    """Flower's strategy of the four that the scenario asks for."""
    section, at_server = accounting.section, accounting.section.where == "server"
    if section.clipping == "fixed":
        fixed = (
            DifferentialPrivacyServerSideFixedClipping
            if at_server
            else DifferentialPrivacyClientSideFixedClipping
        )
        return fixed(
            Chosen(),
            section.noise_multiplier,
            section.clipping_norm,
            scenario.sampled,
            accountant=accounting.accountant,
        )
    adaptive = (
        DifferentialPrivacyServerSideAdaptiveClipping
        if at_server
        else DifferentialPrivacyClientSideAdaptiveClipping
    )
    strategy = adaptive(
        Chosen(),
        section.noise_multiplier,
        scenario.sampled,
        initial_clipping_norm=section.clipping_norm,
        target_clipped_quantile=section.quantile,
    )
    # Flower 1.41 counts who was clipped where Andrew et al. count who was not, and keeps their sign: the norm
    # would shrink while all are clipped and grow while none is.
    strategy.clip_norm_lr = -abs(strategy.clip_norm_lr)
    return strategy


def adaptive_multiplier(strategy: Adaptive, norm_before: float) -> float:
    """The noise multiplier of a round with adaptive clipping, its update and its count of clipped clients.

    Flower clips by the norm before the round and scales its noise by the one after it (1.41): where the norm
    fell, the noise is smaller than was asked, and that is what must be counted.
    """
    update = strategy.noise_multiplier * strategy.clipping_norm / norm_before
    count = 2 * strategy.clipped_count_stddev  # Andrew et al. 2021: one client moves the count by a half
    return float((update**-2 + count**-2) ** -0.5)
