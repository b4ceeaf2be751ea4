"""A node's own business, as its SuperNode was started: its identity, its texts, its way to the cloud.

Only clients of a simulation may leave it out: they are dealt a share of the scenario's data. A node that
stands for somebody has texts of its own or none, and says what is missing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from tightbeam.common.errors import RecipeError
from tightbeam.common.settings.sections import Section, checked_section
from tightbeam.federation.contract.run_config import RunConfig

__all__ = ["NodeSection", "node_section"]

_FLOWERS = ("partition-id", "num-partitions")
_CURE = (
    'Start it with --node-config "partition-id=N identity=\\"/certs/NAME\\" train=\\"/data/train.jsonl\\" '
    'eval=\\"/data/eval.jsonl\\"".'
)


class NodeSection(Section):
    """What `--node-config` says beside the number."""

    identity: Path | None = Field(default=None, description="Folder of its certificate and key.")
    train: Path | None = Field(default=None, description="File that it learns from.")
    eval: Path | None = Field(default=None, description="File that it is evaluated on.")
    answered: Path | None = Field(default=None, description="Folder of what it has answered, if its own.")
    cloud: str | None = Field(default=None, pattern=r"^.+:\d{1,5}$", description="host:port, if its own.")


def node_section(node_config: Mapping[str, Any], run: RunConfig) -> NodeSection:
    """Check what a node was started with for this run.

    Raises:
        RecipeError: a key is unknown, of another kind or missing, or names no file; names it.

    """
    own = {key: value for key, value in node_config.items() if key not in _FLOWERS}
    found = checked_section(NodeSection, own, origin="the node config", cure=_CURE)
    if run.simulated and not own:
        return found
    wanted = {"train": found.train, "eval": found.eval}
    if run.identities is None and not run.scenario.cloud.insecure:
        wanted |= {"identity": found.identity}
    missing = [key for key, value in wanted.items() if value is None]
    if missing:
        raise RecipeError(f"The node config has no {' and no '.join(missing)}.", cure=_CURE)
    for key, path in wanted.items():
        if path is not None and not path.exists():
            raise RecipeError(f"The node config's {key} names {path}, which is not there.", cure=_CURE)
    return found
