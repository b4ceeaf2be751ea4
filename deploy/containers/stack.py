"""A compose file run as containers in a project folder of its own."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import yaml

from containers.engine import Engine

__all__ = ["Stack"]

ROOT = Path(__file__).resolve().parents[2]
_USER = "10001:10001"  # where root runs this; else who runs it


class Stack:
    """A compose file in a project folder of its own; context that takes its containers down."""

    def __init__(self, engine: Engine, folder: Path, file: str, variables: Mapping[str, str]) -> None:
        self.folder, self.file = folder, file
        self.user = _USER if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"
        environment = {**engine.environment, **variables, "TIGHTBEAM_USER": self.user}
        self.engine = Engine(engine.name, engine.compose, environment)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("deploy", "recipes"):
            shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
        content = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
        for body in content["services"].values():
            body.pop("ports", None)  # nobody outside asks, and another stack may have them
        if engine.name == "podman":
            _give_addresses(content)
        (folder / file).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        self.project: str = content["name"]
        self.services: dict[str, dict[str, Any]] = content["services"]

    def __enter__(self) -> Self:
        """Own the folder's files as the containers' user."""
        self.own()
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("down", "--volumes", "--timeout=5", check=False)

    def own(self) -> None:
        """Give the folder to the containers' user."""
        if os.getuid() == 0:
            subprocess.run(["chown", "-R", self.user, str(self.folder)], check=True)  # noqa: S603, S607

    def compose(self, *words: str, within_s: float = 600.0, check: bool = True) -> str:
        """Run a command of compose on this file."""
        return self.engine.up(self.folder, "-f", self.file, *words, within_s=within_s, check=check)

    def container(self, service: str) -> str:
        """Name of a service's container, in either engine's spelling; empty if there is none."""
        names = self.engine.run("ps", "--all", "--format", "{{.Names}}").split()
        known = [f"{self.project}{mark}{service}{mark}1" for mark in "-_"]
        return next((name for name in known if name in names), "")

    def remove(self, service: str) -> None:
        """End a service's container, if there is one, and forget it."""
        if name := self.container(service):
            self.engine.run("rm", "--force", name)

    def start(self, *services: str) -> None:
        """Start services in order, each once those before are healthy or done: older Podman does not wait."""
        for service in services:
            self.compose("up", "-d", "--no-build", "--no-deps", service)
            body = self.services[service]
            if "healthcheck" in body:
                self.wait(partial(self.is_healthy, service), f"{service} is not healthy", 240.0)
            elif body.get("restart") == "no":
                self.done(service)

    def is_healthy(self, service: str) -> bool:
        """Whether the service's own check says so now."""
        test: list[str] = self.services[service]["healthcheck"]["test"]
        return self.engine.code("exec", self.container(service), *test[1:]) == 0

    def state(self, service: str) -> dict[str, Any]:
        """Engine's word on the container."""
        found: dict[str, Any] = json.loads(self.engine.run("inspect", self.container(service)))[0]["State"]
        return found

    def done(self, service: str, within_s: float = 1800.0) -> None:
        """Wait until a service has ended well."""
        self.wait(lambda: self.state(service)["Status"] == "exited", f"{service} is not done", within_s)
        if self.state(service)["ExitCode"]:
            raise SystemExit(f"error: {service} failed: {self.logs(service)[-1500:]}")

    def logs(self, service: str) -> str:
        """What it has said, stdout and stderr."""
        words = (self.engine.name, "logs", self.container(service))
        done = subprocess.run(words, env=self.engine.environment, capture_output=True, text=True, check=False)  # noqa: S603
        return done.stdout + done.stderr

    def wait(self, reached: Callable[[], bool], not_yet: str, within_s: float) -> None:
        """Wait for something; raises SystemExit with the containers' last words when it takes too long."""
        deadline_s = time.monotonic() + within_s
        while not reached():
            if time.monotonic() > deadline_s:
                said = self.compose("logs", check=False)
                raise SystemExit(f"error: {not_yet} after {within_s:.0f} s\n{said[-3000:]}")
            time.sleep(1.0)


def _give_addresses(content: dict[str, Any]) -> None:
    """Let services of internal networks know each other's addresses: older Podman has no DNS there."""
    internal = [name for name, body in content.get("networks", {}).items() if (body or {}).get("internal")]
    for number, network in enumerate(internal):
        prefix = f"10.213.{number}"
        content["networks"][network]["ipam"] = {"config": [{"subnet": f"{prefix}.0/24"}]}
        members = [name for name, body in content["services"].items() if network in body.get("networks", [])]
        hosts = {name: f"{prefix}.{place}" for place, name in enumerate(members, start=10)}
        for name in members:
            body = content["services"][name]
            body["networks"] = {other: {} for other in body["networks"]}
            body["networks"][network] = {"ipv4_address": hosts[name]}
            body["extra_hosts"] = [f"{other}:{address}" for other, address in hosts.items() if other != name]
