"""docs/federation.md names every key of a scenario, and every scenario it points to exists."""

import re
from pathlib import Path

import pytest

from tightbeam.common.settings.messages import known_keys
from tightbeam.federation.profiles import DEVICES, NETWORKS
from tightbeam.federation.scenario import Scenario

DOCS = Path(__file__).parents[2] / "docs" / "federation.md"
TEXT = DOCS.read_text(encoding="utf-8")
TABLE = TEXT[TEXT.index("## Scenario") : TEXT.index("## What is exact")]


def missing(table: str) -> list[str]:
    """Leaves of keys that the table does not spell."""
    words = set(re.findall(r"\w+", table))
    keys = [key for key in known_keys(Scenario) if not key.startswith(("groups.", "client.codec."))]
    return [key for key in keys if key.rpartition(".")[2] not in words]


def test_every_key_is_in_the_table() -> None:
    assert missing(TABLE) == []


def test_a_missing_key_would_be_seen() -> None:
    assert "faults.deadline_s" in missing(TABLE.replace("deadline_s", ""))


@pytest.mark.parametrize("name", [*NETWORKS, *DEVICES])
def test_every_profile_is_named(name: str) -> None:
    assert f"`{name}`" in TABLE


def test_scenarios_that_are_named_exist() -> None:
    folder = DOCS.parents[1] / "simulations" / "tightbeam" / "simulations"
    named = re.findall(r"scenarios/([\w-]+\.yaml)", TEXT)
    assert named
    assert all((folder / "scenarios" / name).is_file() for name in named)
