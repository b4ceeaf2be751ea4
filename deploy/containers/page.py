"""docs/deployment.md, executed block by block as it stands there."""

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from containers.engine import Engine
from containers.images import build_options, build_postgres

__all__ = ["run_page"]

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```sh\n(.*?)^```\n", flags=re.MULTILINE | re.DOTALL)
_EDGES = ("clinic", "hospital")
_BLOCK_S = 900.0
_DOCKER = """#!/bin/sh
# What the page calls docker: the engine of this machine.
case "$1" in
    compose) shift; exec {compose} "$@" ;;
    build) shift; exec {name} build {options} "$@" ;;
    *) exec {name} "$@" ;;
esac
"""


def run_page(engine: Engine, folder: Path, model: Path, texts: Sequence[Path]) -> dict[str, Any]:
    """Run all blocks, `docker build` in the repository and the others in `folder`; what the edges report."""
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    user = "10001:10001" if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"
    tools = folder / "bin"
    tools.mkdir(parents=True)
    for name in ("deploy", "recipes"):
        shutil.copytree(ROOT / name, folder / name)
    with tempfile.TemporaryDirectory(prefix="tightbeam-build-") as build:
        options = " ".join(f"'{word}'" for word in build_options(engine, Path(build)))
        script = _DOCKER.format(
            name=shutil.which(engine.name), compose=" ".join(engine.compose), options=options
        )
        (tools / "docker").write_text(script, encoding="utf-8")
        (tools / "docker").chmod(0o755)
        environment = {
            **engine.environment,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "CLOUD_HOST": _own_address(),
            "MODEL": str(model),
            "POSTGRES_IMAGE": build_postgres(engine),
            "TIGHTBEAM_USER": user,
        }
        try:
            for found in _BLOCK.finditer(page):
                here = ROOT if "docker build" in found[1] else folder
                _run(found[1], here, environment)
                if "cp -r certs/cloud" in found[1]:
                    for edge, path in zip(_EDGES, texts, strict=True):
                        shutil.copy(path, folder / edge / "data" / "train.jsonl")
            return {edge: _report(folder / edge) for edge in _EDGES}
        finally:
            for name in (*_EDGES, "cloud"):
                if (folder / name).is_dir():
                    engine.up(folder / name, "down", "--volumes", "--timeout=5", check=False)


def _run(block: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(  # noqa: S603
        ["/bin/bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=_BLOCK_S,
    )
    if done.returncode:
        raise SystemExit(f"error: docs/deployment.md:\n{block}\n{(done.stderr or done.stdout)[-2000:]}")


def _report(edge: Path, within_s: float = 900.0) -> dict[str, Any]:
    """What the report of an edge says, once there is one."""
    deadline_s = time.monotonic() + within_s
    costs = edge / "runs" / "first-run" / "costs.json"
    while not costs.exists():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"error: {edge.name} has no report after {within_s:.0f} s")
        time.sleep(1.0)
    found: dict[str, Any] = json.loads(costs.read_text(encoding="utf-8"))["edges"][0]
    return found


def _own_address() -> str:
    """An address of this machine that containers reach; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
