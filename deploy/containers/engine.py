"""The container engine of this machine, Docker or Podman, and what it needs to build and run here."""

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

__all__ = ["Engine", "find_engine", "pip_options"]

_LIMIT = 16384  # Podman asks for more than some machines' hard limit
_CARRIED = {"cert", "extra-index-url", "find-links", "index-url", "trusted-host"}
_SMALL_S = 120.0


@dataclass(frozen=True)
class Engine:
    """Commands of one engine and of its compose, with the environment both need."""

    name: str  # docker or podman
    compose: tuple[str, ...]
    environment: Mapping[str, str]

    def run(self, *words: str, within_s: float = _SMALL_S, check: bool = True) -> str:
        """Run a command of the engine; its stdout. Raises SystemExit with its last words when it fails."""
        return self._run((self.name, *words), None, within_s, check)

    def up(self, project: Path, *words: str, within_s: float = 600.0, check: bool = True) -> str:
        """Run a command of compose in a project's folder."""
        return self._run((*self.compose, *words), project, within_s, check)

    def code(self, *words: str) -> int:
        """Exit code of a command."""
        return subprocess.run(  # noqa: S603
            (self.name, *words), env=self.environment, capture_output=True, check=False
        ).returncode

    def stream(self, *words: str) -> None:
        """Run a command whose output is shown as it comes."""
        subprocess.run((self.name, *words), env=self.environment, check=True)  # noqa: S603

    def _run(self, words: Sequence[str], folder: Path | None, within_s: float, check: bool) -> str:
        done = subprocess.run(  # noqa: S603
            words,
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=within_s,
        )
        if check and done.returncode:
            raise SystemExit(f"error: {' '.join(words)}: {(done.stderr or done.stdout).strip()[-1500:]}")
        return done.stdout


def find_engine() -> Engine | str:
    """The engine of this machine, or the reason why there is none."""
    if shutil.which("docker") and _works("docker", "info"):
        if _works("docker", "compose", "version"):
            return Engine("docker", ("docker", "compose"), dict(os.environ))
        return "docker has no compose plugin"
    if not shutil.which("podman"):
        return "neither a running docker nor podman is here"
    environment = _podman_environment()
    if not _works("podman", "info", environment=environment):
        return "podman is here but cannot run (podman info fails)"
    beside = Path(sys.executable).parent / "podman-compose"
    compose = str(beside) if beside.exists() else shutil.which("podman-compose")
    if compose is None:
        return "podman-compose is not installed"
    return Engine("podman", (compose, "--in-pod=false"), environment)


def _works(*words: str, environment: Mapping[str, str] | None = None) -> bool:
    return subprocess.run(words, capture_output=True, check=False, env=environment).returncode == 0  # noqa: S603


def _podman_environment() -> dict[str, str]:
    """Limits that this machine allows; runc where cgroups are not unified; overlay, never whole copies."""
    settings = Path(tempfile.gettempdir()) / f"tightbeam-podman-{os.getuid()}"
    settings.mkdir(mode=0o700, exist_ok=True)
    limits = {name: min(_LIMIT, resource.getrlimit(kind)[1]) for name, kind in _LIMITS.items()}
    listed = ", ".join(f'"{name}={number}:{number}"' for name, number in limits.items())
    engine = 'events_logger = "file"\n'
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    if not unified:
        engine += 'runtime = "runc"\ncgroup_manager = "cgroupfs"\n'
    (settings / "containers.conf").write_text(
        f"[containers]\ndefault_ulimits = [{listed}]\n[engine]\n{engine}", encoding="utf-8"
    )
    environment = os.environ | {"CONTAINERS_CONF": str(settings / "containers.conf")}
    if not unified:
        environment["BUILDAH_RUNTIME"] = "runc"  # builds do not read the file
    if not Path("/run/systemd/system").exists():
        environment["DISABLE_HC_SYSTEMD"] = "true"  # nobody would keep its timers
    if os.getuid() == 0:
        storage = '[storage]\ndriver = "overlay"\nrunroot = "/run/containers/storage"\n'
        storage += 'graphroot = "/var/lib/containers/storage"\n'
        (settings / "storage.conf").write_text(storage, encoding="utf-8")
        environment["CONTAINERS_STORAGE_CONF"] = str(settings / "storage.conf")
    return environment


_LIMITS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}


def pip_options(engine: Engine, folder: Path) -> list[str]:
    """Options of `build` by which pip finds there what it finds here: indexes, wheel folders, certificates.

    Docker cannot mount folders while it builds; it gets indexes that are not local, and no more.
    """
    words = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(?::env:|\w+)\.([\w-]+)='(.*)'$", words, re.MULTILINE):
        if name in _CARRIED:
            known = found.setdefault(name, [])
            known += [part for part in value.split() if part not in known]
    indexes = " ".join(found.pop("extra-index-url", []))
    options = ["--network=host", f"--build-arg=PIP_EXTRA_INDEX_URL={indexes}"]
    if engine.name == "docker":
        return options
    configured = folder / "pip.conf"
    lines = [f"{name} = {' '.join(values)}" for name, values in found.items()]
    configured.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    indexes_here = [Path(urlparse(word).path).parent for word in indexes.split() if word.startswith("file:")]
    named = [Path(value) for values in found.values() for value in values if value.startswith("/")]
    local = [path for path in dict.fromkeys([*indexes_here, *named]) if path.exists()]
    return [
        *options,
        f"--volume={configured}:/etc/pip.conf:ro",
        *(f"--volume={path}:{path}:ro" for path in local),
    ]
