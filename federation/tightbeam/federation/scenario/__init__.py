"""A scenario: a federated experiment as data."""

from tightbeam.federation.scenario.clients import ClientProfile, ClientSection, GroupSection
from tightbeam.federation.scenario.experiment import (
    FLOWER_STRATEGIES,
    SECURE_STRATEGIES,
    Scenario,
    load_scenario,
    scenario_from_mapping,
)
from tightbeam.federation.scenario.sections import (
    AdapterSection,
    CloudSection,
    DataSection,
    FaultsSection,
    OutputSection,
    PartitionSection,
    PrivacySection,
    StrategySection,
    TrainSection,
)

__all__ = [
    "FLOWER_STRATEGIES",
    "SECURE_STRATEGIES",
    "AdapterSection",
    "ClientProfile",
    "ClientSection",
    "CloudSection",
    "DataSection",
    "FaultsSection",
    "GroupSection",
    "OutputSection",
    "PartitionSection",
    "PrivacySection",
    "Scenario",
    "StrategySection",
    "TrainSection",
    "load_scenario",
    "scenario_from_mapping",
]
