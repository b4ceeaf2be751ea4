"""What both apps read from Flower's run config: the scenario, the cloud, and where files go.

Flower's run config holds plain scalars only, so the scenario travels as JSON text, or as the path of its YAML
file. A node's own config may say otherwise about what is the node's own business: its identity and its data.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from tightbeam.common.errors import RecipeError
from tightbeam.federation.scenario import ClientProfile, Scenario, load_scenario, scenario_from_mapping

__all__ = ["RunConfig"]


@dataclass(frozen=True, slots=True)
class RunConfig:
    """The run config, checked."""

    scenario: Scenario
    address: str  # of the cloud
    identities: Path | None  # folder with one identity per client; None: insecure
    folder: Path
    resume: bool = False
    shape: bool = False  # clients reach the cloud over lines as slow as their profiles
    simulated: bool = True  # nodes without texts of their own get a share of the scenario's

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> Self:
        """Read a run config.

        Raises:
            RecipeError: a key is missing, or the scenario is wrong.

        """
        for key in ("scenario", "cloud"):
            if not run_config.get(key):
                raise RecipeError(
                    f"The run config has no {key}.",
                    cure=f"Start with flwr run . --run-config '{key}=\"...\"', or use `tightbeam simulate`.",
                )
        scenario = _scenario(str(run_config["scenario"]))
        identities = str(run_config.get("identities", ""))
        return cls(
            scenario,
            str(run_config["cloud"]),
            Path(identities) if identities else None,
            Path(str(run_config.get("folder") or scenario.folder)),
            bool(run_config.get("resume", False)),
            bool(run_config.get("shape", False)),
            bool(run_config.get("simulated", False)),
        )

    def run_config(self) -> dict[str, str | bool]:
        """Inverse of `of`."""
        return {
            "scenario": self.scenario.model_dump_json(),
            "cloud": self.address,
            "identities": "" if self.identities is None else str(self.identities),
            "folder": str(self.folder),
            "resume": self.resume,
            "shape": self.shape,
            "simulated": self.simulated,
        }

    def profile(self, node_config: Mapping[str, Any]) -> ClientProfile:
        """The client that a node is, by its partition-id.

        Raises:
            RecipeError: it has none, or the scenario has fewer clients.

        """
        number = node_config.get("partition-id")
        profiles = self.scenario.profiles()
        if type(number) is not int or not 0 <= number < len(profiles):
            raise RecipeError(
                f"This node has the partition-id {number}; the scenario has {len(profiles)} clients.",
                cure='Start as many nodes as clients, each with --node-config "partition-id=N".',
            )
        return profiles[number]


@lru_cache(maxsize=4)
def _scenario(text: str) -> Scenario:
    if text.lstrip().startswith("{"):
        return scenario_from_mapping(json.loads(text), origin="the run config's scenario")
    return load_scenario(text)
