"""What goes wrong around Flower's engines: one clear line, the documented exit code, no process left."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from support.clouds import free_port
from support.federations import Playground
from tightbeam.common.errors import (
    CloudUnavailableError,
    CohortError,
    FederationError,
    TightbeamError,
    UsageError,
)
from tightbeam.common.identity.node_keys import init_federation
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.runtimes.flower import Flower, _death, tool
from tightbeam.federation.scenario import Scenario
from tightbeam.simulations.engines import run_deployed

HAS_RAY = importlib.util.find_spec("ray") is not None
DIED = """INFO :      Start `flwr-serverapp` process
ERROR :     ServerApp raised an exception
Traceback (most recent call last):
  File "run_serverapp.py", line 221, in run_serverapp
{0}: {1}
ERROR :     Exit Code: 201
"""


def _tightbeam(folder: Path, *words: str, **variables: str) -> tuple[int, str]:
    """Exit code and the one line of an error."""
    done = subprocess.run(
        [sys.executable, "-m", "tightbeam.cli", *words],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.stdout == ""
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return done.returncode, line


@pytest.fixture
def scenario(playground: Playground) -> Path:
    path = playground.folder / "scenario.yaml"
    found = playground.scenario().model_dump(mode="json")
    path.write_text(yaml.safe_dump(found), encoding="utf-8")
    return path


@pytest.mark.skipif(HAS_RAY, reason="the extra ray is installed")
def test_without_ray_nothing_starts(scenario: Path, tmp_path: Path) -> None:
    code, line = _tightbeam(tmp_path, "simulate", str(scenario), "--runtime", "ray")
    assert (code, line) == (
        2,
        'error: The Ray runtime needs the package ray. Run `pip install "flwr[simulation]<1.43,>=1.41"`.',
    )
    assert not (tmp_path / "federation-1").exists()


def test_another_flower_is_refused_before_anything_starts(scenario: Path, tmp_path: Path) -> None:
    """A version as the package manager would have left it, found before the installed one."""
    other = tmp_path / "other" / "flwr-1.44.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 1.44.0\n", encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(other.parent), os.environ.get("PYTHONPATH"))))
    words = ("simulate", str(scenario), "--runtime", "deployed")
    code, line = _tightbeam(tmp_path, *words, PYTHONPATH=path)
    assert (code, line) == (2, 'error: flwr 1.44.0 is installed. Run `pip install "flwr>=1.41,<1.43"`.')


def test_a_command_of_flower_that_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match=r"flower-hyperlink is not installed.*pip install"):
        tool("flower-hyperlink")
    assert Path(tool("flwr")).is_file()


@pytest.mark.parametrize("command", ["run", "register"])
def test_a_superlink_that_does_not_answer_has_the_exit_code_for_it(
    command: str, scenario: Path, tmp_path: Path
) -> None:
    init_federation(tmp_path / "certs", clients=["clinic"])
    what = str(scenario) if command == "run" else str(tmp_path / "certs" / "roster")
    address = f"127.0.0.1:{free_port()}"
    where = ("--superlink", address, "--ca", str(tmp_path / "certs" / "roster" / "ca.crt"))
    code, line = _tightbeam(tmp_path, "federate", command, what, *where)
    assert code == 6
    assert line.startswith(f"error: The SuperLink at {address} does not answer. Check that it runs")


def test_a_roster_without_keys_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    where = ("--superlink", "127.0.0.1:9", "--ca", "ca.crt")
    code, line = _tightbeam(tmp_path, "federate", "register", str(tmp_path), *where)
    assert code == 2
    assert "holds no *.pub. Make keys with `tightbeam certs federation`." in line


def test_a_deployment_must_be_told_where_the_cloud_is(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("{clients: 1, rounds: 1}", encoding="utf-8")
    where = ("--superlink", "127.0.0.1:9", "--ca", "ca.crt")
    code, line = _tightbeam(tmp_path, "federate", "run", "s.yaml", *where)
    assert (code, line) == (2, "error: s.yaml names no cloud. Set cloud.address to where edges reach it.")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tightbeam.common.errors.CohortError", CohortError),
        ("tightbeam.common.errors.CloudUnavailableError", CloudUnavailableError),
        ("tightbeam.common.errors.UsageError", UsageError),
        ("KeyError", FederationError),
        ("tightbeam.common.errors.NoSuchError", FederationError),
    ],
)
def test_a_run_ends_with_the_error_that_its_server_died_of(name: str, kind: type[TightbeamError]) -> None:
    error = _death("finished:failed", DIED.format(name, "client-00 says: No. Do it."), Path("run.log"))
    assert type(error) is kind
    assert "client-00 says: No. Do it." in str(error)
    assert str(error).endswith("Flower's log: run.log.")
    assert "no error in its log" in str(_death("finished:stopped", "all was well", Path("run.log")))


def test_an_answer_that_is_no_json_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program called flwr, beside this Python as far as it can tell."""
    fake = tmp_path / "bin" / "flwr"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho whatever\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake.parent / "python"))
    flower = Flower.prepare(tmp_path / "home", "superlink", "127.0.0.1:9")
    with pytest.raises(FederationError, match="did not answer in JSON but: 'whatever"):
        flower.ask("list", "superlink")
    fake.write_text("#!/bin/sh\necho 'no such thing' >&2; exit 3\n", encoding="utf-8")
    with pytest.raises(FederationError, match="`flwr list` ended with code 3: no such thing"):
        flower.ask("list", "superlink")


def _settings(playground: Playground, scenario: Scenario) -> RunConfig:
    return RunConfig(scenario, playground.address, None, scenario.folder)


def _flowers(home: Path) -> list[psutil.Process]:
    """Flower's processes with this home, wherever they hang now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _kill_when(ready: Callable[[], bool], words: str, home: Path) -> threading.Thread:
    """Kill the process with these words in its command line as soon as it is time."""

    def kill() -> None:
        deadline_s = time.monotonic() + 600
        while not ready() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        for process in _flowers(home):
            if words in " ".join(process.cmdline()):
                process.kill()
                return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("service", ["superlink", "supernode-1"])
def test_a_service_that_dies_ends_the_run_and_leaves_nothing(playground: Playground, service: str) -> None:
    scenario = playground.scenario(clients=2, rounds=2)
    home, started = (scenario.folder / "flower").absolute(), scenario.folder / "logs" / "supernode-1.log"
    program = "flower-superlink" if service == "superlink" else "partition-id=1"
    killer = _kill_when(lambda: started.exists() and started.stat().st_size > 0, program, home)
    with pytest.raises(TightbeamError, match=f"{service} ended with code -9.*{service}.log") as caught:
        run_deployed(_settings(playground, scenario))
    killer.join(10)
    assert caught.value.exit_code == 1
    assert _flowers(home) == []


@pytest.mark.slow
def test_a_deployed_run_without_cloud_ends_as_in_one_process(playground: Playground) -> None:
    scenario = playground.scenario(clients=2, rounds=1)
    settings = RunConfig(scenario, f"127.0.0.1:{free_port()}", None, scenario.folder)
    with pytest.raises(CloudUnavailableError, match="tightbeam serve") as caught:
        run_deployed(settings)
    assert caught.value.exit_code == 6


@pytest.mark.slow
def test_a_killed_server_goes_on_where_it_was(playground: Playground) -> None:
    """SIGKILL to a deployment's ServerApp after round 1; resumed, it equals a run that was left alone."""
    whole, cut_off = (playground.scenario(clients=2, rounds=2) for _ in range(2))
    playground.run(whole)
    home, state = (cut_off.folder / "flower").absolute(), cut_off.folder / "state" / "round-1.json"
    killer = _kill_when(state.exists, "flwr-serverapp", home)
    with pytest.raises(FederationError, match="Flower's run ended as finished:failed"):
        run_deployed(_settings(playground, cut_off))
    killer.join(10)
    assert state.exists()
    assert not (cut_off.folder / "adapter").exists()
    shutil.copytree(cut_off.folder, cut_off.folder.with_suffix(".untouched"))
    resumed = RunConfig(cut_off, playground.address, None, cut_off.folder, resume=True)
    run_deployed(resumed)
    left, right = playground.state(whole), playground.state(cut_off)
    assert left.keys() == right.keys()
    assert all((left[name] == right[name]).all() for name in left)
    assert [row["round"] for row in playground.rows(cut_off, "round")] == [1, 2]
