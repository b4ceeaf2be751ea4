"""The same apps on Flower's own engines: Ray in processes of this machine, or a SuperLink with SuperNodes.

Both are driven through the `flwr` command, as users drive them, from a folder that holds no code but two
imports. The deployment runs over TLS, and the SuperLink admits only nodes whose keys were registered: plain
processes here, but the same commands as on many machines.

Flower's settings live in `<experiment>/flower/`, so nothing of the user's own is touched.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tightbeam.common.authority import init_certificates
from tightbeam.common.errors import FederationError, UsageError
from tightbeam.common.runs import atomic_write
from tightbeam.simulations.apps.settings import Settings
from tightbeam.simulations.processes import Children

__all__ = ["APP_FILES", "flower_environment", "require_ray", "run_deployed", "run_on_ray"]

_RUN_S = 3600.0
_POLL_S = 2.0
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # Else Flower would install each app's dependencies anew, torch with CUDA among them.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tightbeam-federation"
version = "0.1.0"
description = "Many edges, one adapter: tightbeam's apps for Flower"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["flwr>=1.41,<1.43"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "tightbeam"

[tool.flwr.app.components]
serverapp = "app.server_app:app"
clientapp = "app.client_app:app"

[tool.flwr.app.config]
scenario = ""
cloud = ""
identities = ""
folder = ""
resume = false
"""
_IMPORT = '''"""The {0}'s app."""

from tightbeam.simulations.apps.{0}_app import app

__all__ = ["app"]
'''
APP_FILES: Mapping[str, str] = {
    "pyproject.toml": _PROJECT,
    "app/__init__.py": '"""The two names that Flower asks a project for."""\n',
    "app/client_app.py": _IMPORT.format("client"),
    "app/server_app.py": _IMPORT.format("server"),
}
"""A Flower project, by path; examples/flower_app is the same, with comments."""


def require_ray() -> None:
    """Refuse to start without Ray.

    Raises:
        UsageError: the extra is not installed.

    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("The Ray runtime needs the package ray.", cure='Run `pip install "tightbeam[ray]"`.')


@dataclass(frozen=True, slots=True)
class _Flower:
    """The `flwr` command with its own home."""

    home: Path
    project: Path

    def call(self, *words: str) -> str:
        """Run it; what it printed.

        Raises:
            FederationError: it failed.

        """
        done = subprocess.run(  # noqa: S603  our own words
            [_tool("flwr"), *words],
            cwd=self.project,
            env=flower_environment(self.home),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())[-400:]
            raise FederationError(
                f"`flwr {words[0]}` ended with code {done.returncode}: {said}", cure=f"See {self.home}."
            )
        return done.stdout

    def run(self, connection: str, config: Path, *options: str) -> None:
        """Start a run and wait for its end."""
        told = _json(
            self.call("run", ".", connection, "--run-config", str(config), "--format", "json", *options)
        )
        number = str(told["run-id"])
        deadline_s = time.monotonic() + _RUN_S
        while True:
            listed = _json(self.call("list", connection, "--run-id", number, "--format", "json"))
            (run,) = listed["runs"]
            status = str(run["status"])
            if status.startswith("finished"):
                break
            if time.monotonic() > deadline_s:
                raise FederationError(f"Flower's run {number} took longer than {_RUN_S:.0f} s.")
            time.sleep(_POLL_S)
        log = self.call("log", number, connection, "--show")
        atomic_write(self.home / "run.log", log)
        if status != "finished:completed":
            raise FederationError(
                f"Flower's run ended as {status}: {_last_error(log)}", cure=f"See {self.home / 'run.log'}."
            )


def flower_environment(home: Path) -> dict[str, str]:
    """Variables that keep Flower offline and in its own folder."""
    tools = str(Path(sys.executable).parent)
    path = os.pathsep.join((tools, os.environ.get("PATH", "")))
    return {**os.environ, **_ENVIRONMENT, "FLWR_HOME": str(home), "PATH": path}


def run_on_ray(settings: Settings, *, num_cpus: int = 1) -> None:
    """Run on Flower's simulation engine; each client gets `num_cpus` CPUs.

    Raises:
        UsageError: Ray is not installed.
        FederationError: the run did not complete.

    """
    require_ray()
    flower = _prepare(settings, _config("local", ":local:"))
    options = f"num-supernodes={settings.scenario.clients} client-resources-num-cpus={num_cpus}"
    port = str(_free_port())
    before = os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT")
    os.environ["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = port
    try:
        flower.run("local", flower.home / "experiment.toml", "--federation-config", options)
    finally:
        _stop_local_superlink(flower.home, port)
        if before is None:
            del os.environ["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
        else:
            os.environ["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = before


def run_deployed(settings: Settings) -> None:
    """Run on a SuperLink and one SuperNode per client, all started here, over TLS and with node keys.

    Raises:
        FederationError: the run did not complete.

    """
    port = _free_port()
    address, certificates = f"127.0.0.1:{port}", settings.folder / "flower" / "certs"
    init_certificates(certificates, clients=())
    ca = certificates / "cloud" / "ca.crt"
    flower = _prepare(settings, _config("superlink", address, ca))
    with Children(settings.folder / "logs") as children, _keys(settings) as keys:
        _start_superlink(children, flower.home, certificates / "cloud", port)
        for key in keys:
            flower.call("supernode", "register", f"{key}.pub", "superlink")
        for number, key in enumerate(keys):
            _start_supernode(children, flower.home, address, ca, key, number, len(keys))
        flower.run("superlink", flower.home / "experiment.toml")


def _prepare(settings: Settings, config: str) -> _Flower:
    home = (settings.folder / "flower").absolute()
    for name, text in APP_FILES.items():
        atomic_write(home / "project" / name, text)
    atomic_write(home / "config.toml", config)
    whole = Settings(
        settings.scenario,
        settings.address,
        None if settings.identities is None else settings.identities.absolute(),
        settings.folder.absolute(),
        settings.resume,
    )
    lines = (f"{key} = {json.dumps(value)}" for key, value in whole.run_config().items())
    atomic_write(home / "experiment.toml", "\n".join(lines) + "\n")
    return _Flower(home, home / "project")


def _config(name: str, address: str, ca: Path | None = None) -> str:
    trust = "" if ca is None else f"root-certificates = {json.dumps(str(ca.absolute()))}\n"
    return f'[superlink]\ndefault = "{name}"\n\n[superlink.{name}]\naddress = "{address}"\n{trust}'


@contextlib.contextmanager
def _keys(settings: Settings) -> Iterator[list[Path]]:
    """One P-384 key per node, taken away at the end: they are for this run only."""
    folder = settings.folder.absolute() / "flower" / "keys"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield [_new_key(folder / profile.name) for profile in settings.scenario.profiles()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_key(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP384R1())
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public)
    return path


def _start_superlink(children: Children, home: Path, identity: Path, port: int) -> None:
    command = [_tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ssl-ca-certfile", str(identity / "ca.crt"), "--ssl-certfile", str(identity / "tls.crt")]
    command += ["--ssl-keyfile", str(identity / "tls.key"), "--enable-supernode-auth"]
    command += ["--disable-runtime-dependency-installation"]
    child = children.start("superlink", command, flower_environment(home))
    deadline_s = time.monotonic() + 120
    while not _listens(port):
        child.require_alive_or_done()
        if time.monotonic() > deadline_s:
            raise FederationError("The SuperLink did not come up.", cure=f"See {child.log}.")
        time.sleep(0.2)


def _start_supernode(
    children: Children, home: Path, address: str, ca: Path, key: Path, number: int, count: int
) -> None:
    command = [_tool("flower-supernode"), "--superlink", address, "--root-certificates", str(ca.absolute())]
    command += ["--host", "127.0.0.1", "--port", str(_free_port()), "--auth-supernode-private-key", str(key)]
    command += ["--node-config", f"partition-id={number} num-partitions={count}"]
    children.start(f"supernode-{number}", command, flower_environment(home))


def _stop_local_superlink(home: Path, port: str) -> None:
    """`flwr run` leaves its SuperLink running for ever; it is known by its port."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "flower-superlink" in line and port in line:
            for child in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()


def _tool(name: str) -> str:
    """Beside this Python first: another environment's Flower would run other apps."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise UsageError(
            f"The command {name} is not installed.", cure='Run `pip install "flwr>=1.41,<1.43"`.'
        )
    return found


def _json(text: str) -> dict[str, Sequence[dict[str, object]]]:
    found: dict[str, Sequence[dict[str, object]]] = json.loads(text[text.index("{") :])
    return found


def _last_error(log: str) -> str:
    """The last line of a traceback: our errors are one line with their cure."""
    lines = [line.strip() for line in log.splitlines() if re.search(r"(Error|Exception)\b.*:", line)]
    return lines[-1] if lines else "no error in its log."


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
