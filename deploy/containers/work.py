"""Both compose files of the repository run to the end, and what their reports say."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from containers.engine import Engine
from containers.images import IMAGE
from containers.stack import Stack

__all__ = ["prepare_demo", "run_demo", "run_federation"]

EDGES = ("quiz", "companion")
_SECURE = """
clients: 3
rounds: 1
data: {max_length: 128}
client: {cut: "4:4", r: 8}
train: {steps: 2, batch_size: 4}
strategy: {name: ffa, secure: true}
output: {dir: runs, name: secure}
"""
_NUM_TEXTS = 48  # of each edge: some steps, not an education
CLIENTS = ("client-00", "client-01", "client-02")


def tightbeam(engine: Engine, folder: Path, *words: str) -> None:
    """Run the image's command in a folder."""
    mount = f"--volume={folder}:/here"
    options = ("--rm", "--network=none", mount, "--workdir=/here", "--user=0:0")
    engine.run("run", *options, IMAGE, *words)


def prepare_demo(stack: Stack, texts: Sequence[Path]) -> None:
    """Make identities, folders and data as the head of docker-compose.yml asks."""
    folder = stack.folder
    for name in ("cloud", *EDGES):
        (folder / "runs" / name).mkdir(parents=True)
    for name, path in zip(EDGES, texts, strict=True):
        (folder / "data" / name).mkdir(parents=True)
        few = path.read_text(encoding="utf-8").splitlines(keepends=True)[:_NUM_TEXTS]
        (folder / "data" / name / "train.jsonl").write_text("".join(few), encoding="utf-8")
    clients = [f"--client={name}" for name in EDGES]
    tightbeam(stack.engine, folder, "certs", "init", "certs", *clients, "--host=cloud")
    stack.own()


def run_demo(engine: Engine, folder: Path, model: Path, texts: Sequence[Path]) -> dict[str, Any]:
    """One cloud, two edges, to the end; what their reports say of them."""
    with Stack(engine, folder, "docker-compose.yml", {"MODEL": str(model)}) as stack:
        prepare_demo(stack, texts)
        stack.start("cloud", *EDGES)
        found: dict[str, Any] = {}
        for name in EDGES:
            stack.done(name)
            run = folder / "runs" / name / "first-run"
            assert (run / "report.html").is_file()
            (found[name],) = json.loads((run / "costs.json").read_text(encoding="utf-8"))["edges"]
    return found


def run_federation(
    engine: Engine, folder: Path, model: Path, texts: Sequence[Path], haproxy: str
) -> dict[str, Any]:
    """One cloud, a SuperLink behind the filter, three nodes; the accounts of the experiment."""
    variables = {"MODEL": str(model), "HAPROXY_IMAGE": haproxy, "SCENARIO": "./secure.yaml"}
    with Stack(engine, folder, "docker-compose.federation.yml", variables) as stack:
        (folder / "secure.yaml").write_text(_SECURE, encoding="utf-8")
        for part in ("certs", "runs/cloud", "runs/server", *(f"runs/{name}" for name in CLIENTS)):
            (folder / "data" / "federation" / part).mkdir(parents=True)
        for number, name in enumerate(CLIENTS):
            data = folder / "data" / "federation" / "data" / name
            data.mkdir(parents=True)
            deal(texts[number % len(texts)], data, number)
        stack.own()
        stack.start("certs", "superlink", "fleet", "register", "cloud", *CLIENTS, "submit")
        server = folder / "data" / "federation" / "runs" / "server"
        (report,) = server.rglob("federation.json")
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def deal(texts: Path, folder: Path, number: int) -> None:
    """Give a client some lines to train on and some to be judged by."""
    lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)
    mine = lines[number :: len(CLIENTS)]
    (folder / "train.jsonl").write_text("".join(mine[4:20]), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(mine[:4]), encoding="utf-8")
