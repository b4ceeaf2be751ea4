"""Flower's own commands, as users type them, with a home of their own and a project without code.

Settings of `flwr`, the project that it submits and the log of its run live in `<experiment>/flower/`, so
nothing of the user's own is touched. A run that fails raises the error that its ServerApp died of: same
class, same words, same exit code as in one process.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tightbeam.common import errors
from tightbeam.common.errors import (
    CloudUnavailableError,
    FederationError,
    IdentityError,
    TightbeamError,
    UsageError,
    reason,
)
from tightbeam.common.files import atomic_write
from tightbeam.federation.contract.run_config import RunConfig

__all__ = ["ENVIRONMENT", "Flower", "app_files", "flower_environment", "flower_home", "tool"]

_CLIENT_APP = "tightbeam.federation.client.client_app"
_RUN_S = 86_400.0
_ASK_S = 5.0  # asking takes `flwr` two seconds of computing
_WATCH_S = 0.5
_TLS_S = 10.0
ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # Else Flower would install each app's dependencies anew, torch with CUDA among them.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Variables that keep Flower and Ray offline, and the installed packages as they are."""
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
shape = false
simulated = false
"""
_IMPORT = '''"""The {0}'s app."""

from {1} import app

__all__ = ["app"]
'''
_ENDED = re.compile(r"\btightbeam\.common\.errors\.(\w+): (.*)")
_ANY_ERROR = re.compile(r"^\s*([\w.]*(?:Error|Exception)\b.*:.*)$", re.M)


@dataclass(frozen=True, slots=True)
class Flower:
    """The `flwr` command with its own home; `connection` names the SuperLink in that home's settings."""

    home: Path
    connection: str
    address: str
    ca: Path | None = None  # which signed the SuperLink's certificate

    @classmethod
    def prepare(
        cls,
        home: Path,
        connection: str,
        address: str,
        ca: Path | None = None,
        *,
        client_app: str = _CLIENT_APP,
    ) -> Self:
        """Write settings and project; `:local:` as address is a SuperLink that `flwr` starts itself."""
        for name, text in app_files(client_app).items():
            atomic_write(home / "project" / name, text)
        trust = "" if ca is None else f"root-certificates = {json.dumps(str(ca.absolute()))}\n"
        section = f'[superlink.{connection}]\naddress = "{address}"\n{trust}'
        atomic_write(home / "config.toml", f'[superlink]\ndefault = "{connection}"\n\n{section}')
        return cls(home.absolute(), connection, address, ca)

    def call(self, *words: str) -> str:
        """Run it; what it printed.

        Raises:
            FederationError: it failed.

        """
        done = subprocess.run(  # noqa: S603  our own words
            [tool("flwr"), *words],
            cwd=self.home / "project",
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

    def ask(self, *words: str) -> dict[str, Any]:
        """Run it and read its answer: with a format that is for machines, it ends with code 0 in any case.

        Raises:
            CloudUnavailableError: the SuperLink does not answer.
            IdentityError: its certificate is not of the authority that was given.
            FederationError: it refused, or something stands between.

        """
        try:
            told = _answer(self.call(*words, "--format", "json"))
        except FederationError:
            self._require_tls()
            raise
        if told.get("success"):
            return told
        self._require_tls()
        said = str(told.get("error-message", "it does not say why"))
        if "unavailable" in said:
            raise CloudUnavailableError(
                f"The SuperLink at {self.address} does not answer.",
                cure="Check that it runs, and that this machine may reach it.",
            )
        cure = f"See {self.home}."
        if "403 Forbidden" in said:
            cure = "Speak to the SuperLink itself: a filter lets nodes through, no operator."
        said = " ".join(line for line in said.splitlines()[1:] if line.strip())  # after whom it spoke to
        raise FederationError(f"`flwr {words[0]}` failed: {said}", cure=cure)

    def _require_tls(self) -> None:
        """Tell why the SuperLink's certificate is not taken, if that is it; `flwr` calls it unavailable.

        Raises:
            IdentityError: the authority is another one, or no certificate can be read or is shown.

        """
        if self.ca is None:
            return
        cure = "Give --ca the roster/ca.crt of the `tightbeam certs federation` that the SuperLink is of."
        host, _, port = self.address.rpartition(":")
        try:
            trust = ssl.create_default_context(cafile=str(self.ca))
        except OSError as error:  # SSLError is one
            raise IdentityError(f"{self.ca} holds no certificate: {reason(error)}.", cure=cure) from error
        try:
            with (
                socket.create_connection((host, int(port)), _TLS_S) as line,
                trust.wrap_socket(line, server_hostname=host),
            ):
                return
        except ssl.SSLCertVerificationError as error:
            why = f"has a certificate that {self.ca} does not vouch for: {error.verify_message}"
        except ssl.SSLError as error:
            why = f"does not speak TLS: {error.reason}"
        except (OSError, ValueError):
            return  # it is away
        raise IdentityError(f"The SuperLink at {self.address} {why}.", cure=cure)

    def register(self, roster: Path) -> list[str]:
        """Admit the nodes whose public keys are in `roster`; the names of those that were not known yet.

        Raises:
            UsageError: there are no keys.
            CloudUnavailableError, FederationError: see `ask`.

        """
        keys = sorted(roster.glob("*.pub"))
        if not keys:
            raise UsageError(f"{roster} holds no *.pub.", cure="Make keys with `tightbeam certs federation`.")
        admitted = []
        for key in keys:
            try:
                self.ask("supernode", "register", str(key.absolute()), self.connection, "--name", key.stem)
            except FederationError as error:
                if "already in use" not in error.message:
                    raise
            else:
                admitted.append(key.stem)
        return admitted

    def run(self, run: RunConfig, *options: str, watch: Callable[[], None] = lambda: None) -> None:
        """Submit a run and wait for its end; `watch` may raise meanwhile.

        Raises:
            TightbeamError: what the ServerApp died of.
            FederationError: it ended otherwise than well, or too late; and as `ask`.

        """
        lines = (f"{key} = {json.dumps(value)}" for key, value in run.run_config().items())
        config = self.home / "experiment.toml"
        atomic_write(config, "\n".join(lines) + "\n")
        with _watched(watch):
            told = self.ask("run", ".", self.connection, "--run-config", str(config), *options)
            number = str(told["run-id"])
            status = self._wait(number, watch)
            log = self.call("log", number, self.connection, "--show")
        atomic_write(self.home / "run.log", log)
        if status != "finished:completed":
            raise _death(status, log, self.home / "run.log")

    def _wait(self, number: str, watch: Callable[[], None]) -> str:
        deadline_s = time.monotonic() + _RUN_S
        while time.monotonic() < deadline_s:
            (run,) = self.ask("list", self.connection, "--run-id", number)["runs"]
            status = str(run["status"])
            if status.startswith("finished"):
                return status
            ask_s = time.monotonic() + _ASK_S
            while time.monotonic() < ask_s:
                watch()
                time.sleep(_WATCH_S)
        raise FederationError(f"Flower's run {number} took longer than {_RUN_S:.0f} s.")


@contextlib.contextmanager
def _watched(watch: Callable[[], None]) -> Iterator[None]:
    """A SuperLink that has ended says more than `flwr` about one that does not answer."""
    try:
        yield
    except (CloudUnavailableError, FederationError):
        watch()
        raise


def app_files(client_app: str = _CLIENT_APP) -> dict[str, str]:
    """A Flower project, by path; `client_app` is the client app's module.

    examples/flower_app is that of simulations, with comments.
    """
    return {
        "pyproject.toml": _PROJECT,
        "app/__init__.py": '"""The two names that Flower asks a project for."""\n',
        "app/client_app.py": _IMPORT.format("client", client_app),
        "app/server_app.py": _IMPORT.format("server", "tightbeam.federation.server.server_app"),
    }


def flower_home(folder: Path) -> Path:
    """Where an experiment keeps what Flower needs."""
    return folder / "flower"


def flower_environment(home: Path) -> dict[str, str]:
    """Variables that keep Flower offline and in its own folder."""
    tools = str(Path(sys.executable).parent)
    path = os.pathsep.join((tools, os.environ.get("PATH", "")))
    return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home), "PATH": path}


def tool(name: str) -> str:
    """Path of one of Flower's commands: beside this Python first, another environment's would run other apps.

    Raises:
        UsageError: it is not installed.

    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise UsageError(
            f"The command {name} is not installed.", cure='Run `pip install "flwr>=1.41,<1.43"`.'
        )
    return found


def _death(status: str, log: str, path: Path) -> TightbeamError:
    """The ServerApp's last error, of our own class if it was one of ours."""
    cure = f"Flower's log: {path}."
    ours = _ENDED.findall(log)
    if ours:
        name, text = ours[-1]
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, TightbeamError):
            return kind(text.strip(), cure=cure)
    found = _ANY_ERROR.findall(log)
    last = found[-1].strip() if found else "no error in its log."
    return FederationError(f"Flower's run ended as {status}: {last}", cure=cure)


def _answer(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(text[text.index("{") :])
        return found
    raise FederationError(f"`flwr` did not answer in JSON but: {text[-200:]!r}.", cure="Check its version.")
