"""The changelog knows the version that pyproject.toml names, and the lock file the ranges' packages."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): number for name, number in pairs}


def test_newest_entry_is_the_project_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", text, flags=re.M)
    assert released[0] == PROJECT["version"] == version("tightbeam")


def test_every_dependency_has_a_tested_version_inside_its_range() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    tested = pinned()
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert name in tested, f"{name} is not in constraints.txt"
        assert tested[name] in requirement.specifier, (
            f"{name} {tested[name]} is outside {requirement.specifier}"
        )


def test_no_pin_is_a_local_build() -> None:
    assert [number for number in pinned().values() if "+" in number] == []
