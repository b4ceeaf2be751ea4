"""The doctor against real clouds, and against everything that is not one."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.clouds import free_port
from support.commands import Cloud
from support.tiny import tiny_model
from tightbeam.common.identity.authority import init_certificates
from tightbeam.edge import connect
from tightbeam.edge.doctor import Finding, examine


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    init_certificates(folder / "ours", clients=["clinic"])
    init_certificates(folder / "theirs", clients=["clinic"])
    init_certificates(folder / "elsewhere", clients=["clinic"], cloud_names=["elsewhere.example"])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cloud(certs: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    folder = tmp_path_factory.mktemp("cloud")
    with Cloud(model, folder, "--identity", str(certs / "ours" / "cloud")) as running:
        yield running


@pytest.fixture(scope="module")
def insecure_cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with Cloud(model, tmp_path_factory.mktemp("insecure")) as running:
        yield running


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def last(findings: list[Finding]) -> Finding:
    assert all(finding.ok for finding in findings[:-1]), findings
    return findings[-1]


def test_all_is_well_with_a_cloud(cloud: Cloud, certs: Path) -> None:
    findings = examine(cloud.address, identity=certs / "ours" / "clinic")
    assert [finding for finding in findings if not finding.ok] == []
    names = ["python", "packages", "device", "identity", "dns", "tcp", "tls", "health", "protocol", "model"]
    assert [finding.name for finding in findings] == [*names, "clock", "round trip", "step"]
    details = {finding.name: finding.detail for finding in findings}
    assert "TLSv1.3, h2" in details["tls"]
    assert "6 blocks of width 32" in details["model"]
    assert "clinic" in details["identity"]


def ask_health(address: str, identity: Path | None = None) -> tuple[int, str]:
    """Exit code and stdout of what the compose files have as health check."""
    words = [] if identity is None else ["--identity", str(identity)]
    command = [sys.executable, "-m", "tightbeam.common.health", address, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout.strip()


def test_any_identity_of_the_authority_may_ask_for_health(
    cloud: Cloud, insecure_cloud: Cloud, certs: Path
) -> None:
    for name in ("cloud", "clinic"):
        assert ask_health(cloud.address, certs / "ours" / name) == (0, "SERVING")
    assert ask_health(insecure_cloud.address) == (0, "SERVING")


def test_what_is_no_healthy_cloud_is_not_healthy(cloud: Cloud, certs: Path, tmp_path: Path) -> None:
    code, said = ask_health(f"127.0.0.1:{free_port()}")
    assert (code, said.partition(":")[0]) == (1, "UNAVAILABLE")
    code, said = ask_health(cloud.address, certs / "theirs" / "clinic")
    assert (code, said.partition(":")[0]) == (1, "UNAVAILABLE")
    code, said = ask_health(cloud.address, tmp_path)
    assert (code, said.partition(":")[0]) == (1, "no identity")


def test_asking_for_health_loads_little() -> None:
    """It runs every half minute; a whole doctor cost seconds of a core each time."""
    listed = "import sys, tightbeam.common.health; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True).stdout
    assert "grpc" in loaded.split()
    heavy = {"torch", "transformers", "typer", "rich", "cryptography", "google.protobuf", "numpy"}
    assert heavy & set(loaded.split()) == set()


def test_an_edge_with_the_clouds_identity(cloud: Cloud, certs: Path) -> None:
    finding = last(examine(cloud.address, identity=certs / "ours" / "cloud"))
    assert (finding.name, finding.ok) == ("card", False)
    assert "is the cloud's identity" in finding.detail


def test_nothing_is_billed(cloud: Cloud, certs: Path) -> None:
    clinic = certs / "ours" / "clinic"
    assert last(examine(cloud.address, identity=clinic)).name == "step"
    with connect(cloud.address, identity=clinic) as connected:
        assert list(connected.usage()) == []


def test_insecure_elsewhere(insecure_cloud: Cloud) -> None:
    """A cloud is there and answers; `train` would refuse the address all the same."""
    finding = last(examine(f"0.0.0.0:{insecure_cloud.port}", insecure=True))  # which reaches loopback
    assert (finding.name, finding.ok) == ("card", False)
    assert "not a loopback address" in finding.detail


def test_a_cloud_that_takes_no_steps(insecure_cloud: Cloud) -> None:
    """Its streams are all taken, so that `train` would wait in vain."""
    with connect(insecure_cloud.address, insecure=True) as other:
        steppers = [other.open_steps("1:1") for _ in range(32)]
        for stepper in steppers:
            stepper.probe(other.card.hidden_size)
        finding = last(examine(insecure_cloud.address, insecure=True))
    assert (finding.name, finding.ok) == ("step", False)
    assert "32 open streams" in finding.detail


def test_identity_of_another_authority(cloud: Cloud, certs: Path) -> None:
    finding = last(examine(cloud.address, identity=certs / "theirs" / "clinic"))
    assert (finding.name, finding.ok) == ("tls", False)
    assert "tightbeam certs init" in finding.cure


def test_certificate_for_another_name(certs: Path, model: Path, tmp_path: Path) -> None:
    with Cloud(model, tmp_path, "--identity", str(certs / "elsewhere" / "cloud")) as running:
        finding = last(examine(running.address, identity=certs / "elsewhere" / "clinic"))
    assert (finding.name, finding.ok) == ("tls", False)
    assert "--host 127.0.0.1" in finding.cure


def test_tls_cloud_asked_without_tls(cloud: Cloud) -> None:
    finding = last(examine(cloud.address, insecure=True, timeout_s=2.0))
    assert (finding.name, finding.ok) == ("health", False)
    assert "--identity" in finding.cure


def test_no_identity_given() -> None:
    finding = last(examine("127.0.0.1:1"))
    assert (finding.name, finding.ok) == ("identity", False)
    assert "--identity DIR" in finding.cure


def test_identity_folder_that_is_not_there(tmp_path: Path) -> None:
    finding = last(examine("127.0.0.1:1", identity=tmp_path / "nowhere"))
    assert (finding.name, finding.ok) == ("identity", False)
    assert "tightbeam certs init" in finding.cure


@pytest.mark.parametrize("address", ["localhost", ":50051", "host:port"])
def test_what_is_not_an_address(address: str) -> None:
    assert last(examine(address, insecure=True)).name == "address"


def test_name_that_nobody_knows() -> None:
    assert last(examine("nobody.invalid:50051", insecure=True)).name == "dns"


def test_nothing_listens() -> None:
    finding = last(examine(f"127.0.0.1:{free_port()}", insecure=True))
    assert finding.name == "tcp"
    assert "tightbeam serve" in finding.cure


def test_something_else_listens(listener: socket.socket, certs: Path) -> None:
    def greet() -> None:
        for _ in range(2):  # once for the look whether anybody listens, once for TLS
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 smtp.example ready\r\n")

    greeter = threading.Thread(target=greet)
    greeter.start()
    finding = last(examine(address_of(listener), identity=certs / "ours" / "clinic", timeout_s=2.0))
    greeter.join(10)
    assert (finding.name, finding.ok) == ("tls", False)


def test_silence_has_a_deadline(listener: socket.socket) -> None:
    finding = last(examine(address_of(listener), insecure=True, timeout_s=0.5))
    assert (finding.name, finding.ok) == ("health", False)
