"""The compose files for machines of their own: what each mounts, what starts again, what has limits."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tightbeam.edge.recipe import load_recipe

ROOT = Path(__file__).parents[2]
FILES = ("cloud/compose.yml", "edge/compose.yml", "edge/node.yml", "federation-server/compose.yml")


def services(file: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "deploy" / file).read_text("utf-8"))["services"]
    return found


ALL = [(file, name) for file in FILES for name in services(file)]


def sources(body: dict[str, Any]) -> set[str]:
    return {volume.removesuffix(":ro").rsplit(":", 1)[0] for volume in body["volumes"]}


@pytest.mark.parametrize(("file", "name"), ALL)
def test_nobody_is_root_and_everybody_has_limits(file: str, name: str) -> None:
    body = services(file)[name]
    assert body["user"] == "${TIGHTBEAM_USER:-1000:1000}"
    assert body["cap_drop"] == ["ALL"]
    assert body["security_opt"] == ["no-new-privileges:true"]
    assert body["mem_limit"]
    assert body["logging"]["options"] == {"max-size": "10m"}


@pytest.mark.parametrize(("file", "name"), ALL)
def test_services_are_started_again_jobs_when_they_fail(file: str, name: str) -> None:
    expected = {"edge": "on-failure", "register": "no", "submit": "no"}
    assert services(file)[name]["restart"] == expected.get(name, "unless-stopped")


@pytest.mark.parametrize(("file", "name"), ALL)
def test_folders_are_mounted_that_hold_one_holders_keys(file: str, name: str) -> None:
    """`certs` as a whole has the authority's key in it and everybody else's."""
    folders = {"identity", "node", "roster", "secrets", "data", "runs", "cache", "ledger"}
    files = {"recipe.yaml", "scenario.yaml", ".."}
    for source in sources(services(file)[name]):
        assert "certs" not in source
        assert source != "."
        first = Path(source.removeprefix("./")).parts[0]
        assert first in folders | files or source.startswith("${MODEL")


def test_no_password_stands_in_a_variable_or_a_command() -> None:
    cloud = services("cloud/compose.yml")
    assert "--ledger=postgresql://tightbeam@ledger:5432/tightbeam" in cloud["cloud"]["command"]
    assert cloud["cloud"]["environment"]["PGPASSFILE"] == "/secrets/pgpass"
    assert cloud["ledger"]["environment"]["POSTGRES_PASSWORD_FILE"] == "/secrets/password"
    assert "./secrets/password" not in sources(cloud["cloud"])


def test_the_clouds_health_is_asked_as_in_the_demo() -> None:
    demo = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    assert services("cloud/compose.yml")["cloud"]["healthcheck"] == demo["cloud"]["healthcheck"]


def test_the_superlink_is_behind_the_filter() -> None:
    content = yaml.safe_load((ROOT / "deploy/federation-server/compose.yml").read_text(encoding="utf-8"))
    assert content["networks"]["control"] == {"internal": True}
    published = {name for name, body in content["services"].items() if "ports" in body}
    assert published == {"fleet"}
    assert content["services"]["superlink"]["networks"] == ["control"]


def test_the_edges_overrides_fit_its_recipe() -> None:
    words = services("edge/compose.yml")["edge"]["command"]
    assert words[:2] == ["train", "/srv/recipe.yaml"]
    changes = [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    plain = [word.replace("${RUN:-first-run}", "first-run") for word in changes]
    plain = [word.replace("${CLOUD:-cloud.example:50051}", "cloud.example:50051") for word in plain]
    recipe = load_recipe(ROOT / "recipes" / "compose.yaml", plain)
    assert recipe.run_folder.as_posix() == "/runs/first-run"
