"""docker-compose.federation.yml keeps edges off the SuperLink and keys with their owners; read as YAML."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tightbeam.federation.runtimes.flower import ENVIRONMENT
from tightbeam.federation.scenario import load_scenario

ROOT = Path(__file__).parents[2]
EDGES = ("client-00", "client-01", "client-02")
OPERATOR = {"superlink", "register", "submit"}
Services = dict[str, dict[str, Any]]


@pytest.fixture
def content() -> dict[str, Any]:
    text = (ROOT / "docker-compose.federation.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.fixture
def services(content: dict[str, Any]) -> Services:
    found: Services = content["services"]
    return found


def within_reach(services: Services, name: str) -> set[str]:
    """Other services on a network of this one."""
    mine = set(services[name].get("networks", ["default"]))
    return {other for other, body in services.items() if mine & set(body.get("networks", ["default"]))} - {
        name
    }


def sources(service: dict[str, Any]) -> dict[str, str]:
    """Target -> source of its mounts."""
    found = (volume.removesuffix(":ro").rsplit(":", 1) for volume in service["volumes"])
    return {target: source for source, target in found}


def exposed_keys(services: Services) -> dict[str, set[str]]:
    """Parts of the certificates' folder that each service sees."""
    start = "./data/federation/certs"
    return {
        name: {s.removeprefix(start).strip("/") for s in sources(body).values() if s.startswith(start)}
        for name, body in services.items()
    }


def test_edges_reach_the_cloud_and_the_filter_but_not_the_superlink(services: Services) -> None:
    for name in EDGES:
        assert within_reach(services, name) == {"cloud", "fleet", *EDGES} - {name}


def test_the_superlink_is_reached_by_the_filter_and_the_operator_only(
    content: dict[str, Any], services: Services
) -> None:
    assert within_reach(services, "superlink") == {"fleet", "register", "submit"}
    assert content["networks"]["control"] == {"internal": True}
    published = {name for name, body in services.items() if "ports" in body}
    assert published == {"cloud", "fleet"}
    assert all(port.startswith("127.0.0.1:") for name in published for port in services[name]["ports"])


def test_an_edge_on_the_control_network_would_be_seen(services: Services) -> None:
    careless = copy.deepcopy(services)
    careless["client-01"]["networks"].append("control")
    assert "superlink" in within_reach(careless, "client-01")
    del careless["superlink"]["networks"], careless["client-02"]["networks"]
    assert "superlink" in within_reach(careless, "client-02")


def test_everybody_has_their_own_keys_and_nobody_an_authority(services: Services) -> None:
    seen = exposed_keys(services)
    assert seen.pop("certs") == {""}, "it makes them, and has no network"
    assert services["certs"]["network_mode"] == "none"
    assert seen.pop("cloud") == {"edges/cloud"}
    assert seen.pop("superlink") == seen.pop("fleet") == {"fleet/cloud"}
    assert seen.pop("register") == seen.pop("submit") == {"roster"}
    for name in EDGES:
        assert seen.pop(name) == {f"nodes/{name}", f"edges/{name}"}
    assert not seen


@pytest.mark.parametrize("name", EDGES)
def test_an_edge_has_its_own_texts_and_its_own_number(services: Services, name: str) -> None:
    mounts, words = sources(services[name]), services[name]["command"]
    assert mounts["/data"] == f"./data/federation/data/{name}"
    assert mounts["/srv/runs"] == f"./data/federation/runs/{name}"
    (config,) = (word.partition("=")[2] for word in words if word.startswith("--node-config="))
    said = dict(part.split("=") for part in config.split())
    assert said["partition-id"] == str(EDGES.index(name))
    assert said["num-partitions"] == str(len(EDGES))
    files = (said["identity"], said["train"], said["eval"])
    assert files == ('"/identity"', '"/data/train.jsonl"', '"/data/eval.jsonl"')
    assert "--superlink=fleet:8443" in words
    assert "--insecure" not in words


def test_edges_differ_in_nothing_else(services: Services) -> None:
    plain = set()
    for number, name in enumerate(EDGES):
        text = yaml.safe_dump(services[name])
        plain.add(text.replace(name, "NAME").replace(f"partition-id={number}", "partition-id=N"))
    assert len(plain) == 1


def test_the_superlink_admits_registered_nodes_only_and_installs_nothing(services: Services) -> None:
    words = services["superlink"]["command"]
    assert "--enable-supernode-auth" in words
    assert "--disable-runtime-dependency-installation" in words
    assert "--insecure" not in words


@pytest.mark.parametrize("name", ["certs", "cloud", *sorted(OPERATOR), "fleet", *EDGES])
def test_nobody_is_root_and_flower_stays_offline(services: Services, name: str) -> None:
    body = services[name]
    assert body["user"] == "${TIGHTBEAM_USER:-1000:1000}"
    assert body["cap_drop"] == ["ALL"]
    assert body["security_opt"] == ["no-new-privileges:true"]
    if name != "fleet":
        offline = {
            key: value for key, value in ENVIRONMENT.items() if key.startswith("FLWR_") and "POLL" not in key
        }
        assert body["environment"].items() >= offline.items()


def test_both_files_build_the_same_image(services: Services) -> None:
    simple = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    for key in ("image", "build", "user", "init", "cap_drop", "security_opt"):
        assert services["cloud"][key] == simple["services"]["cloud"][key], key
    assert services["cloud"]["healthcheck"] == simple["services"]["cloud"]["healthcheck"]


def test_engines_before_25_take_the_health_checks(services: Services) -> None:
    """Compose refuses `start_interval` there; it looks at the engine, so no schema finds it."""
    simple = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    checks = [body["healthcheck"] for body in (*services.values(), *simple.values()) if "healthcheck" in body]
    assert len(checks) == 3
    assert {key for check in checks for key in check} == {
        "test", "interval", "timeout", "retries", "start_period"
    }  # fmt: skip


def test_the_scenario_is_right_and_wants_as_many_clients_as_there_are(services: Services) -> None:
    words = services["submit"]["command"]
    changes = [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    source = sources(services["submit"])["/srv/scenario.yaml"]
    assert source == "${SCENARIO:-./deploy/federation.yaml}"
    scenario = load_scenario(ROOT / "deploy" / "federation.yaml", changes)
    assert scenario.clients == len(EDGES)
    assert [profile.name for profile in scenario.profiles()] == list(EDGES)
    assert scenario.cloud.address == "cloud:50051"
    assert not scenario.folder.is_absolute()


@pytest.mark.parametrize("name", ["certs", "cloud", *sorted(OPERATOR), "fleet", *EDGES])
def test_services_are_started_again_and_jobs_are_not(services: Services, name: str) -> None:
    """A node that was killed is refused for a minute: once is not enough for it, nor is an exit code."""
    jobs = {"certs", "register", "submit"}
    assert services[name]["restart"] == ("no" if name in jobs else "unless-stopped")
    assert services[name]["logging"]["options"]["max-size"]
    assert services[name]["mem_limit"]


def test_who_waits_for_whom(services: Services) -> None:
    waits = {name: body.get("depends_on", {}) for name, body in services.items()}
    for name in EDGES:
        assert waits[name]["register"]["condition"] == "service_completed_successfully"
        assert waits[name]["cloud"]["condition"] == "service_healthy"
    assert set(waits["submit"]) == set(EDGES)
    assert all(needed in services for needs in waits.values() for needed in needs)
