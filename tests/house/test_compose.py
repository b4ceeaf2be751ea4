"""docker-compose.yml says what it should; it is read as YAML, because the tests need no container engine."""

import re
import shlex
import subprocess
import tomllib
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
    assert check["test"][:4] == ["CMD", "python", "-m", "tightbeam.common.health"]
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
    stages = [line.split()[1] for line in instructions if line.startswith("FROM ")]
    assert stages == ["${BASE_IMAGE}"] * 3
    assert instructions[-3].split() == ["USER", "10001:10001"]


def test_the_image_takes_torch_for_cpus_unless_told() -> None:
    """A plain version would let pip take the one with CUDA, which is gigabytes larger."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (version,) = re.findall(r"^ARG TORCH=(.+)\+cpu$", text, re.MULTILINE)
    assert f"\ntorch=={version}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_image_has_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (extras,) = re.findall(r'^ARG EXTRAS="(.+)"$', text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split()) <= set(project["optional-dependencies"])
    assert {"postgres", "privacy"} <= set(extras.split())


@pytest.mark.parametrize("name", ["cloud", *EDGES])
def test_a_service_that_fails_is_started_again_and_has_limits(name: str) -> None:
    service = services()[name]
    assert service["restart"] == ("unless-stopped" if name == "cloud" else "on-failure")
    assert service["logging"]["options"]["max-size"]
    assert service["mem_limit"]
    assert service["pids_limit"]


@pytest.mark.parametrize(("there", "last"), [(False, "--set=output.dir=/runs"), (True, "--resume")])
def test_an_edge_that_is_started_again_goes_on(tmp_path: Path, there: bool, last: str) -> None:
    """Its entrypoint is run by a real shell, with the run's folder elsewhere."""
    edge = services()["quiz"]
    shell, flag, script, name = edge["entrypoint"]
    script = (
        script.replace("$$", "$").replace("/runs/", f"{tmp_path}/").replace("exec tightbeam", "exec echo")
    )
    if there:
        config = tmp_path / "first-run" / "config.yaml"
        config.parent.mkdir()
        config.touch()
    done = subprocess.run(
        [shell, flag, script, name, *edge["command"]], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["train", *edge["command"][1:], *([last] if there else [])]


def test_the_image_copies_what_is_there_and_ignores_the_rest() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        word
        for line in text.splitlines()
        if line.startswith("COPY") and "--from" not in line
        for word in shlex.split(line)[1:-1]
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
