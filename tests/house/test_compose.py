"""docker-compose.yml says what it should; it is read as YAML, because the tests need no container engine."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tightbeam.edge.recipe import load_recipe

ROOT = Path(__file__).parents[2]
EDGES = ("quiz", "companion")


def services() -> dict[str, dict[str, Any]]:
    content = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = content["services"]
    return found


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Target -> (source, mode)."""
    parts = [re.fullmatch(r"(.+):(/[^:]+)(?::(ro))?", volume) for volume in service["volumes"]]
    return {part[2]: (part[1], part[3] or "rw") for part in parts if part}


def user_ids(user: str) -> list[str]:
    """Numbers of `user:`, with the default of a variable taken."""
    return re.sub(r"\$\{\w+:-(.*)\}", r"\1", user).split(":")


def test_one_cloud_and_two_edges() -> None:
    assert sorted(services()) == sorted(["cloud", *EDGES])
    assert services()["cloud"]["command"][0] == "serve"
    assert {services()[edge]["command"][0] for edge in EDGES} == {"train"}


@pytest.mark.parametrize("name", ["cloud", *EDGES])
def test_nobody_is_root(name: str) -> None:
    service = services()[name]
    assert "0" not in user_ids(service["user"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_root_would_be_seen() -> None:
    assert "0" in user_ids("${WHO:-0:0}")
    assert user_ids("${WHO:-1000:1000}") == ["1000", "1000"]


def test_the_cloud_is_health_checked_and_edges_wait_for_it() -> None:
    check = services()["cloud"]["healthcheck"]
    assert check["test"][:3] == ["CMD", "tightbeam", "doctor"]
    for edge in EDGES:
        assert services()[edge]["depends_on"] == {"cloud": {"condition": "service_healthy"}}


def test_model_certificates_and_runs_are_volumes() -> None:
    assert mounts(services()["cloud"])["/model"][1] == "ro"
    for name, service in services().items():
        assert mounts(service)["/identity"] == (f"./certs/{name}", "ro")
        assert mounts(service)["/runs"] == (f"./runs/{name}", "rw")


@pytest.mark.parametrize("name", EDGES)
def test_an_edge_sees_its_own_texts_and_no_key_of_another(name: str) -> None:
    sources = [source for source, _ in mounts(services()[name]).values()]
    assert f"./data/{name}" in sources
    others = {"cloud", *EDGES} - {name}
    assert [source for source in sources if Path(source).name in others] == []
    assert "./certs" not in sources


def test_the_cloud_sees_no_texts() -> None:
    assert [source for source, _ in mounts(services()["cloud"]).values() if "data" in source] == []


def test_the_base_image_is_a_build_argument() -> None:
    assert services()["cloud"]["build"]["args"]["BASE_IMAGE"].startswith("${BASE_IMAGE:-python:3.11")
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    instructions = [line for line in lines if line and not line.startswith("#")]
    assert instructions[0].startswith("ARG BASE_IMAGE=python:3.11")
    assert instructions[1] == "FROM ${BASE_IMAGE}"
    assert instructions[-3].split() == ["USER", "10001:10001"]


def test_the_image_copies_what_is_there_and_ignores_the_rest() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        word for line in text.splitlines() if line.startswith("COPY") for word in shlex.split(line)[1:-1]
    ]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"
    }
    assert allowed == set(copied)


@pytest.mark.parametrize("name", EDGES)
def test_the_recipe_and_its_overrides_are_right(name: str) -> None:
    command = services()[name]["command"]
    overrides = [word.removeprefix("--set=") for word in command if word.startswith("--set=")]
    recipe = load_recipe(ROOT / mounts(services()[name])["/srv/recipe.yaml"][0], overrides)
    assert recipe.model.cloud == "cloud:50051"
    assert recipe.run_folder.as_posix().startswith("/runs/")
    assert not recipe.model.insecure
