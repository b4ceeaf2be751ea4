"""Starts that cannot become a run: they end at once, name what to do, and leave nothing in the way."""

import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState, RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from support.clouds import free_port
from tightbeam.common.errors import CloudUnavailableError, IdentityError, UsageError
from tightbeam.common.identity.node_keys import init_federation
from tightbeam.federation.runtimes.flower import Flower
from tightbeam.federation.scenario import scenario_from_mapping
from tightbeam.federation.server import roster
from tightbeam.federation.server.roster import Roster


def _simulated(nodes: int) -> InMemoryGrid:
    """What Flower's simulation engine hands a ServerApp, with its nodes registered by Flower itself."""
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    run = Run.create_empty(run_id=7)
    run.federation_id = NOOP_FEDERATION_ID
    state = factory.state()
    assert isinstance(state, InMemoryLinkState)
    run.primary_task_id = 8
    state.run_ids[run.run_id] = RunRecord(run=run)
    state.task_store[8] = Task(task_id=8, run_id=run.run_id)
    _register_nodes(nodes, factory)
    grid = InMemoryGrid(factory)
    grid.set_run(run)
    return grid


def test_a_simulation_with_too_few_nodes_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(roster, "_STEADY_S", 0.2)
    scenario = scenario_from_mapping({"clients": 3, "rounds": 1})
    with pytest.raises(UsageError, match=r"simulates 2 nodes, .* waits for 3 clients") as caught:
        Roster(_simulated(2), scenario).gather()
    assert '--federation-config "num-supernodes=3"' in str(caught.value)
    assert "2 of 3 clients are there; waiting" in caplog.text


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server with a SuperLink's certificate, that knows none of its calls; its address and the folder."""
    certs = tmp_path_factory.mktemp("fleet") / "certs"
    init_federation(certs, clients=["client-00"], fleet_hosts=["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "fleet" / "cloud" / "tls.crt", certs / "fleet" / "cloud" / "tls.key")
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", certs
    server.shutdown()
    thread.join()
    server.server_close()


def _ask(home: Path, address: str, ca: Path) -> None:
    Flower.prepare(home, "superlink", address, ca).ask("list", "superlink")


def test_a_foreign_authority_is_named_with_its_exit_code(superlink: tuple[str, Path], tmp_path: Path) -> None:
    address, _ = superlink
    init_federation(tmp_path / "other", clients=["client-00"])
    ca = tmp_path / "other" / "roster" / "ca.crt"
    with pytest.raises(IdentityError, match=r"certificate that .*ca\.crt does not vouch for") as caught:
        _ask(tmp_path / "home", address, ca)
    assert caught.value.exit_code == 3
    assert "roster/ca.crt" in str(caught.value)


@pytest.mark.parametrize("text", [None, "no certificate"], ids=["missing", "garbage"])
def test_a_file_that_is_no_certificate_is_named(
    superlink: tuple[str, Path], tmp_path: Path, text: str | None
) -> None:
    ca = tmp_path / "ca.crt"
    if text:
        ca.write_text(text, encoding="ascii")
    with pytest.raises(IdentityError, match=r"ca\.crt holds no certificate"):
        _ask(tmp_path / "home", superlink[0], ca)


def test_with_its_own_authority_it_is_no_matter_of_certificates(
    superlink: tuple[str, Path], tmp_path: Path
) -> None:
    address, certs = superlink
    flower = Flower.prepare(tmp_path / "home", "superlink", address, certs / "roster" / "ca.crt")
    flower._require_tls()
    away = Flower.prepare(
        tmp_path / "home", "superlink", f"127.0.0.1:{free_port()}", certs / "roster" / "ca.crt"
    )
    with pytest.raises(CloudUnavailableError, match="does not answer"):
        away.ask("list", "superlink")
