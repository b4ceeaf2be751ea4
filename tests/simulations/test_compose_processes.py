"""A compose file's services as processes: what is replaced, in which order they start, how they fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from tightbeam.common.errors import TightbeamError, UsageError
from tightbeam.simulations.compose import Composition, read_services

SLEEP = "import time; time.sleep(60)"
FILE = """
services:
  maker:
    entrypoint: [python, -c]
    command: ["import pathlib; pathlib.Path('/made/key').write_text('k')"]
    volumes: ["./certs:/made"]
  server:
    entrypoint: [python, -c]
    command:
      - |
        import http.server, os
        os.chdir('/made')
        http.server.HTTPServer(('0.0.0.0', 8000), http.server.SimpleHTTPRequestHandler).serve_forever()
    volumes: ["./certs:/made:ro"]
    depends_on: {maker: {condition: service_completed_successfully}}
    healthcheck:
      test: [CMD, python, -c, "import urllib.request as r; r.urlopen('http://localhost:8000/key')"]
  caller:
    entrypoint: [python, -c]
    command: ["import os; print(open('/in/word').read(), os.environ['WHERE'], os.getcwd())"]
    environment: {WHERE: "${WHERE:-server:8000} /in $$5"}
    volumes: ["./word:/in/word:ro", "cache:/cache"]
    tmpfs: [/tmp]
    depends_on: {server: {condition: service_healthy}}
  broken:
    entrypoint: [python, -c]
    command: ["import sys; sys.exit('error: no luck')"]
  waiting:
    entrypoint: [python, -c, "SLEEP"]
    depends_on: {broken: {condition: service_completed_successfully}}
""".replace("SLEEP", SLEEP)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "certs").mkdir()
    (tmp_path / "word").write_text("hello", encoding="utf-8")
    (tmp_path / "compose.yml").write_text(FILE, encoding="utf-8")
    return tmp_path


def _composition(project: Path) -> Composition:
    return Composition(read_services(project / "compose.yml", {}), project, project / "root", network=201)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/made", "{made}"),
        ("--to=/made/a b", "--to={made}/a b"),
        ("x=\"/made\" y='/made'", "x=\"{made}\" y='{made}'"),
        ("/made-up", "/made-up"),
        ("/not/made", "/not/made"),
        ("server:8000", "{server}:8000"),
        ("https://server:8000/made", "https://{server}:8000/made"),
        ("server", "server"),
        ("a-server:8000", "a-server:8000"),
        ("--cloud-host=server", "--cloud-host={server}"),
        ("--client=server", "--client=server"),
        ("0.0.0.0:80 localhost", "{own}:80 {own}"),
    ],
)
def test_paths_and_addresses_are_replaced_and_nothing_else(project: Path, text: str, said: str) -> None:
    composition = _composition(project)
    maker, server = composition.host("maker"), composition.host("server")
    made = str(composition.root / "maker" / "made")
    expected = said.format(made=made, server=server, own=maker)
    assert composition.translate(composition.services["maker"], text) == expected


def test_variables_have_defaults(project: Path) -> None:
    def where(variables: dict[str, str]) -> str:
        return read_services(project / "compose.yml", variables)["caller"].environment["WHERE"]

    assert where({}) == "server:8000 /in $5"
    assert where({"WHERE": "there"}) == "there /in $5"


@pytest.mark.skipif(sys.platform != "linux", reason="services have loopback addresses of their own")
def test_services_start_after_what_they_need_and_end_with_the_context(project: Path) -> None:
    with _composition(project) as composition:
        composition.start(["caller"])
        composition.wait("caller", 30)
        said = composition.child("caller").answer.read_text(encoding="utf-8").split()
        server = composition.child("server").process
        assert server.poll() is None
    assert (project / "certs" / "key").read_text(encoding="utf-8") == "k"
    assert said == [
        "hello",
        f"{composition.host('server')}:8000",
        "/in",
        "$5",
        str(project / "root/caller/srv"),
    ]
    assert server.poll() is not None
    assert composition.children.alive() == []


def test_hosts_are_loopback_addresses_of_their_own(project: Path) -> None:
    composition = _composition(project)
    hosts = [composition.host(name) for name in composition.services]
    assert len(set(hosts)) == len(hosts)
    assert all(host.startswith("127.0.201.") for host in hosts)


def test_a_service_that_fails_is_named_and_what_needs_it_does_not_start(project: Path) -> None:
    with (
        pytest.raises(TightbeamError, match="broken ended with code 1: error: no luck"),
        _composition(project) as composition,
    ):
        composition.start(["waiting"])
    assert not (project / "root" / "logs" / "waiting.log").exists()


def test_a_mount_without_source_is_named(project: Path) -> None:
    (project / "word").unlink()
    with pytest.raises(UsageError, match=r"caller needs .*word"), _composition(project) as composition:
        composition.start(["caller"])


def test_a_service_without_entrypoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "compose.yml"
    path.write_text("services: {a: {command: [x]}}", encoding="utf-8")
    with pytest.raises(UsageError, match="Service a cannot be run"):
        read_services(path)


@pytest.mark.parametrize(("until", "code", "said"), [("maker", 0, ""), ("broken", 1, "error: broken ended")])
def test_the_script_ends_as_the_awaited_service(project: Path, until: str, code: int, said: str) -> None:
    command = [sys.executable, "-m", "tightbeam.simulations.compose", "compose.yml", "--until", until]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
