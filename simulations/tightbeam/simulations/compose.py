"""The services of a compose file as plain processes of this machine: same commands, no container engine.

    python -m tightbeam.simulations.compose docker-compose.federation.yml --until submit

What containers give is stood in for, one for one:

    a file system of its own    a folder <root>/<service>, in which every mount is a link to its source
    a network address           a loopback address per service; Linux answers on all of 127.0.0.0/8
    depends_on, healthcheck     kept: a service starts when those it needs run, are healthy or are done

In commands and variables, mounted paths and the names of services in front of a port are replaced by these.
Users, capabilities and networks have no stand-in; tests/house reads them. Made for tests, and for trying a
deployment out.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tightbeam.common.errors import TightbeamError, UsageError
from tightbeam.federation.runtimes.processes import Child, Children, signals_as_exit

__all__ = ["Composition", "Service", "main", "read_services"]

_HEALTHY_S = 240.0
_DONE_S = 3600.0
_POLL_S = 0.2
_WORKING_FOLDER = "/srv"  # as the image has it
_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::-([^}]*))?\})")


@dataclass(frozen=True, slots=True)
class Service:
    """What of a compose service a process needs."""

    name: str
    words: tuple[str, ...]  # entrypoint and command
    environment: Mapping[str, str]
    mounts: Mapping[str, str]  # place in the container -> source, which begins with . or / or names a volume
    needs: Mapping[str, str]  # service -> condition
    check: tuple[str, ...]  # command that ends well once it is healthy; empty if there is none


def read_services(path: Path, variables: Mapping[str, str] = os.environ) -> dict[str, Service]:
    """Services of a compose file, with `${NAME:-default}` replaced.

    Raises:
        UsageError: a service says what this module has no stand-in for.

    """
    content = _resolve(yaml.safe_load(path.read_text(encoding="utf-8")), variables)
    return {name: _service(name, body) for name, body in content["services"].items()}


def _resolve(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _VARIABLE.sub(lambda m: "$" if m[1] is None else variables.get(m[1]) or m[2] or "", value)
    if isinstance(value, list):
        return [_resolve(item, variables) for item in value]
    if isinstance(value, dict):
        return {key: _resolve(item, variables) for key, item in value.items()}
    return value


def _service(name: str, body: Mapping[str, Any]) -> Service:
    parts = {key: body.get(key, []) for key in ("entrypoint", "command", "volumes", "tmpfs")}
    if not parts["entrypoint"] or not all(isinstance(part, list) for part in parts.values()):
        raise UsageError(
            f"Service {name} cannot be run as a process.",
            cure="Give entrypoint, command, volumes and tmpfs as lists, and the entrypoint in any case.",
        )
    check = body.get("healthcheck", {}).get("test", ["CMD"])
    mounts = dict.fromkeys(parts["tmpfs"], "")
    for volume in parts["volumes"]:
        source, target = volume.removesuffix(":ro").rsplit(":", 1)
        mounts[target] = source
    return Service(
        name,
        tuple(map(str, [*parts["entrypoint"], *parts["command"]])),
        {key: str(value) for key, value in body.get("environment", {}).items()},
        mounts,
        {needed: terms["condition"] for needed, terms in body.get("depends_on", {}).items()},
        tuple(check[1:]),
    )


@dataclass
class Composition:
    """Services of a compose file, started in order; context that stops all that it started.

    Sources of mounts are looked for in `project`; `network` is the third number of all addresses.
    """

    services: Mapping[str, Service]
    project: Path
    root: Path
    network: int = 1
    children: Children = field(init=False)
    _started: dict[str, Child] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.children = Children(self.root / "logs", grace_s=20.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.children.__exit__(kind, error, trace)

    def host(self, name: str) -> str:
        """The loopback address that stands for a service."""
        return f"127.0.{self.network}.{1 + list(self.services).index(name)}"

    def start(self, names: Iterable[str]) -> None:
        """Start services after all that they need.

        Raises:
            TightbeamError: one that is needed failed or does not become healthy.

        """
        for name in names:
            if name in self._started:
                continue
            service = self.services[name]
            self.start(service.needs)
            for needed, condition in service.needs.items():
                self._wait_for(needed, condition)
            self._started[name] = self._launch(service)

    def wait(self, name: str, within_s: float = _DONE_S) -> None:
        """Wait until a service is done; raises TightbeamError when it or another fails before."""
        self._until(self._started[name].require_alive_or_done, f"{name} is not done", within_s)

    def child(self, name: str) -> Child:
        """The process of a service that was started."""
        return self._started[name]

    def translate(self, service: Service, text: str) -> str:
        """Put this machine's paths and addresses into a word or a variable of a service."""
        paths = _any_of(sorted(service.mounts, key=len, reverse=True))
        names = _any_of(self.services)
        pattern = rf"(?<![\w./-])(?P<path>{paths})(?=[/\"'\s]|$)"
        pattern += r"|\b(?P<own>0\.0\.0\.0|127\.0\.0\.1|localhost)\b"
        # in front of a port, or where a certificate is made for it
        pattern += rf"|(?<![\w.-])(?P<peer>{names})(?=:\d)|(?<=-host=)(?P<named>{names})$"

        def replace(found: re.Match[str]) -> str:
            if found["path"]:
                return f"{self.root / service.name}{found['path']}"
            return self.host(found["peer"] or found["named"] or service.name)

        return re.sub(pattern, replace, text)  # in one go: what was put in is not looked at again

    def _launch(self, service: Service) -> Child:
        folder = self._furnish(service)
        words = [self.translate(service, word) for word in service.words]
        return self.children.start(service.name, words, self._environment(service), folder)

    def _environment(self, service: Service) -> dict[str, str]:
        tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        own = {name: self.translate(service, value) for name, value in service.environment.items()}
        return {"PATH": tools, **own}

    def _furnish(self, service: Service) -> Path:
        """Make the folder that stands for its file system; its working folder is returned."""
        home = self.root / service.name
        for target, source in sorted(service.mounts.items()):
            place = home / target.removeprefix("/")
            if not source:
                place.mkdir(parents=True, exist_ok=True)
                continue
            volume = self.root / "volumes" / source
            real = self.project / Path(source).expanduser() if source[0] in "./~" else volume
            if real is volume:
                volume.mkdir(parents=True, exist_ok=True)
            if not real.exists():
                raise UsageError(f"{service.name} needs {real}.", cure="See the head of the compose file.")
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.is_symlink():
                place.symlink_to(real.absolute())
        folder = home / _WORKING_FOLDER.removeprefix("/")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _wait_for(self, name: str, condition: str) -> None:
        child, service = self._started[name], self.services[name]
        if condition == "service_completed_successfully":
            self._until(child.require_alive_or_done, f"{name} is not done", _DONE_S)
        elif condition == "service_healthy":
            self._until(lambda: self._is_healthy(service), f"{name} is not healthy", _HEALTHY_S)

    def _is_healthy(self, service: Service) -> bool:
        words = [self.translate(service, word) for word in service.check]
        environment = os.environ | self._environment(service)
        folder = self.root / service.name
        done = subprocess.run(words, capture_output=True, check=False, env=environment, cwd=folder)  # noqa: S603
        return done.returncode == 0

    def _until(self, reached: Callable[[], bool], not_yet: str, within_s: float) -> None:
        deadline_s = time.monotonic() + within_s
        while not reached():
            for child in self._started.values():
                child.require_alive_or_done()
            if time.monotonic() > deadline_s:
                raise TightbeamError(f"{not_yet} after {within_s:.0f} s.", cure=f"See {self.root / 'logs'}.")
            time.sleep(_POLL_S)


def _any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words)) or "(?!)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run services until one of them is done; exit code 1 and one line if any fails."""
    parser = argparse.ArgumentParser(description="Run the services of a compose file as plain processes.")
    parser.add_argument("file", type=Path, help="a compose file; its folder is where mounts are looked for")
    parser.add_argument("--until", required=True, metavar="SERVICE", help="end when this one is done")
    parser.add_argument("--root", type=Path, default=Path(".processes"), help="stands for the containers")
    chosen = parser.parse_args(arguments)
    services = read_services(chosen.file)
    project, root = chosen.file.absolute().parent, chosen.root.absolute()
    try:
        with signals_as_exit(), Composition(services, project, root) as composition:
            composition.start([chosen.until])
            composition.wait(chosen.until)
            print(composition.child(chosen.until).answer.read_text(encoding="utf-8"), end="")
    except TightbeamError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
