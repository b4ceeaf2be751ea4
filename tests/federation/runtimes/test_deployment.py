"""docker-compose.federation.yml run as plain processes: a real SuperLink, a real proxy, real nodes."""

import http.client
import json
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from flwr.proto.control_pb2 import (
    ListRunsRequest,
    ListRunsResponse,
)
from safetensors.numpy import load_file

from support.compositions import EDGES, HAPROXY, federation
from support.federations import Playground
from tightbeam.common.errors import FederationError
from tightbeam.federation.runtimes.flower import Flower
from tightbeam.federation.scenario import load_scenario
from tightbeam.simulations.compose import Composition

pytestmark = [
    pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="services have loopback addresses of their own"),
]
PROTOBUF = {"Content-Type": "application/protobuf", "Accept": "application/protobuf"}
FLEET, SUPERLINK = ("fleet", 8443), ("superlink", 8000)


def _ask(
    composition: Composition, service: tuple[str, int], method: str, path: str, body: bytes = b""
) -> tuple[int, bytes]:
    """One request, its path sent as it is; trust is that of an edge."""
    name, port = service
    trust = ssl.create_default_context(
        cafile=composition.project / "data/federation/certs/nodes/client-00/ca.crt"
    )
    connection = http.client.HTTPSConnection(composition.host(name), port, context=trust, timeout=30)
    try:
        connection.request(method, path, body, PROTOBUF)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _wait_for_port(composition: Composition, service: tuple[str, int]) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex((composition.host(service[0]), service[1])) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"{service} does not listen")


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    """The SuperLink and the filter before it, without cloud and edges."""
    with federation(tmp_path_factory.mktemp("gate"), {}) as composition:
        composition.start(["fleet"])
        _wait_for_port(composition, FLEET)
        yield composition


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/control/list-runs"),
        ("POST", "/v1/runtime/pull-task"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "/v1/fleet/..%2fcontrol%2fstart-run"),
        ("POST", "/v1/fleet//v1/control/start-run"),
        ("POST", "//v1/control/start-run"),
        ("POST", "/V1/CONTROL/start-run"),
        ("POST", "/health/../v1/control/start-run"),
        ("POST", "/health"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/fleet/get-run"),
        ("GET", "/"),
    ],
)
def test_an_edge_is_refused_everything_but_the_fleet_interface(
    gate: Composition, method: str, path: str
) -> None:
    assert _ask(gate, FLEET, method, path)[0] == 403


def test_an_edge_cannot_start_a_run_with_flowers_own_client(gate: Composition, tmp_path: Path) -> None:
    """Through the filter nothing starts; behind it the same command does, and nobody asks who one is."""
    ca = gate.project / "data/federation/certs/nodes/client-00/ca.crt"
    edge, operator = (
        Flower.prepare(tmp_path / name, "superlink", f"{gate.host(name)}:{port}", ca)
        for name, port in (FLEET, SUPERLINK)
    )
    for words in (("run", ".", "superlink"), ("list", "superlink")):
        with pytest.raises(FederationError, match=r"403 Forbidden.*Speak to the SuperLink itself"):
            edge.ask(*words)
    with pytest.raises(FederationError, match="403 Forbidden"):
        edge.register(gate.project / "data/federation/certs/roster")
    assert operator.ask("run", ".", "superlink")["run-id"]
    assert operator.register(gate.project / "data/federation/certs/roster") == list(EDGES)
    assert operator.register(gate.project / "data/federation/certs/roster") == [], "they are known now"
    nothing = ListRunsRequest().SerializeToString()
    status, body = _ask(gate, SUPERLINK, "POST", "/v1/control/list-runs", nothing)
    assert status == 200
    assert len(ListRunsResponse.FromString(body).run_dict) == 1, "the edge's run is not there"


def test_what_edges_need_passes(gate: Composition) -> None:
    assert _ask(gate, FLEET, "GET", "/health")[0] == 200
    direct, passed = (
        _ask(gate, service, "POST", "/v1/fleet/activate-node") for service in (SUPERLINK, FLEET)
    )
    assert passed == direct, "the SuperLink answers, not the filter"
    assert passed[0] == 401, "and it asks for a registered key"


def test_the_filter_says_whom_it_refused(gate: Composition) -> None:
    _ask(gate, FLEET, "POST", "/v1/control/stop-run")
    _ask(gate, FLEET, "GET", "/health")
    log = gate.child("fleet").answer.read_text(encoding="utf-8")
    assert any("/v1/control/stop-run" in line and " 403 " in line for line in log.splitlines())
    assert "/health" not in log.replace("/health/..", "").replace("POST /health", "")


@pytest.mark.slow
def test_three_nodes_train_what_one_process_trains(
    playground: Playground, backbone: Path, tmp_path: Path
) -> None:
    """Registered nodes, TLS, a filter, two rounds: the adapter of the in-process grid."""
    here = playground.scenario(eval_every=1)
    playground.run(here)
    plain = here.model_dump(mode="json", exclude={"cloud", "output"})
    file = tmp_path / "scenario.yaml"
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    variables = {"MODEL": str(backbone), "SCENARIO": str(file)}
    with federation(tmp_path, variables) as composition:
        data = composition.project / "data" / "federation" / "data"
        for name in EDGES:
            for kind in ("train", "eval"):
                shutil.copy(here.folder / "clients" / name / f"{kind}.jsonl", data / name)
        composition.start(["submit"])
        composition.wait("submit", 900)
        printed = composition.child("submit").answer.read_text(encoding="utf-8").strip()
    runs = composition.project / "data" / "federation" / "runs"
    server = runs / "server" / load_scenario(file).folder.relative_to("runs")
    assert printed == "runs/federation/report.html"
    assert (server / "report.html").is_file()
    left, right = playground.state(here), _last_state(server, here.rounds)
    assert left.keys() == right.keys()
    assert max(float(np.abs(left[name] - right[name]).max()) for name in left) <= 1e-6
    assert any(np.abs(array).max() > 1e-3 for array in right.values())
    rounds = json.loads((server / "federation.json").read_text(encoding="utf-8"))["rounds"]
    assert [(row["round"], row["updates"]) for row in rounds] == [(1, 3), (2, 3)]
    for name in EDGES:
        own = runs / name / "federation" / "clients"
        assert [path.name for path in own.iterdir()] == [name], "an edge's ledger stays with it"
        assert not (server / "clients").exists()
    assert composition.children.alive() == []


def _last_state(folder: Path, number: int) -> dict[str, np.ndarray]:
    arrays = load_file(folder / "state" / f"round-{number}.safetensors")
    return {name: array for name, array in arrays.items() if name.startswith("global/")}
