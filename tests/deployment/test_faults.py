"""Faults between hosts: a cloud and an edge in containers of their own; same bits, one bill, nothing lost."""

import contextlib
import hashlib
import json
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from containers.engine import Engine
from containers.stack import Stack
from containers.work import prepare_demo

pytestmark = pytest.mark.slow
Bill = dict[tuple[int, str], int]


@pytest.fixture(scope="module")
def stack(engine: Engine, folder: Path, backbone: Path, texts: list[Path]) -> Iterator[Stack]:
    """The cloud of docker-compose.yml, healthy, and what its edges need; they train twelve epochs."""
    with Stack(engine, folder / "faults", "docker-compose.yml", {"MODEL": str(backbone)}) as running:
        prepare_demo(running, texts)
        recipe = running.folder / "recipes" / "compose.yaml"
        changed = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        changed["train"]["epochs"] = 12
        changed["train"]["checkpoint_every"] = 1
        recipe.write_text(yaml.safe_dump(changed), encoding="utf-8")
        running.start("cloud")
        yield running


@pytest.fixture(scope="module")
def calm(stack: Stack) -> tuple[str, Bill]:
    """Adapter and bill of a run that nothing disturbs."""
    return disturbed(stack, lambda: None)


def disturbed(stack: Stack, fault: Callable[[], None]) -> tuple[str, Bill]:
    """Train anew, with a fault after the third step; the adapter's hash and the cloud's bill."""
    run = stack.folder / "runs" / "quiz" / "first-run"
    stack.remove("quiz")
    subprocess.run(["rm", "-rf", str(run)], check=True)
    stack.start("quiz")
    stack.wait(lambda: len(edge_bill(run)) >= 6, "no step was taken", 240)
    fault()
    stack.done("quiz", within_s=500)
    billed, own = cloud_bill(stack, run), edge_bill(run)
    assert billed == own, "both sides have the same steps, each once"
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(adapter).hexdigest(), billed


def edge_bill(run: Path) -> Bill:
    """What the edge's ledger says: step and kind -> tokens."""
    path = run / "ledger.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {(row["step"], row["kind"]): row["tokens"] for row in rows if row["row"] == "step"}


def cloud_bill(stack: Stack, run: Path) -> Bill:
    """What the cloud's ledger says of the same run."""
    lines = (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    (name,) = {row["run"] for row in map(json.loads, lines) if row["row"] == "run"}
    copy = stack.folder / "copy"  # the cloud keeps every other process out of its ledger
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(stack.folder / "runs" / "cloud", copy)
    with contextlib.closing(sqlite3.connect(copy / "ledger.db")) as ledger:
        rows = ledger.execute("SELECT step, kind, tokens FROM steps WHERE run = ?", (name,)).fetchall()
    return {(step, kind): tokens for step, kind, tokens in rows}


def test_a_cloud_cut_off_for_half_a_minute(stack: Stack, calm: tuple[str, Bill]) -> None:
    def cut_off() -> None:
        network, cloud = f"{stack.project}_default", stack.container("cloud")
        stack.engine.run("network", "disconnect", network, cloud)
        time.sleep(30.0)
        stack.engine.run("network", "connect", "--alias", "cloud", network, cloud)

    assert disturbed(stack, cut_off) == calm


def test_a_cloud_killed_and_started_on_a_new_address(stack: Stack, calm: tuple[str, Bill]) -> None:
    before = address(stack, "cloud")

    def replace() -> None:
        stack.engine.run("kill", stack.container("cloud"))
        stack.engine.run("run", "--detach", "--name=squatter", f"--network={stack.project}_default",
                         "--entrypoint=sleep", "tightbeam:0.1.0", "600")  # fmt: skip
        stack.engine.run("start", stack.container("cloud"))

    try:
        assert disturbed(stack, replace) == calm
        assert address(stack, "cloud") != before
    finally:
        stack.engine.run("rm", "--force", "--time=0", "squatter", check=False)


def test_a_slow_line_that_loses_packets(stack: Stack, calm: tuple[str, Bill]) -> None:
    """3 Mbit/s, 100 ms there and back, one packet of a hundred lost."""
    shaped = "tc qdisc add dev eth0 root netem delay 100ms rate 3mbit loss 1%"

    def shape() -> None:
        pid = str(stack.state("quiz")["Pid"])
        done = subprocess.run(
            ["nsenter", "-t", pid, "-n", *shaped.split()], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"this kernel cannot shape a line: {done.stderr.strip()}")

    assert disturbed(stack, shape) == calm


def test_an_edge_killed_as_the_kernel_kills_at_its_limit(stack: Stack, calm: tuple[str, Bill]) -> None:
    """SIGKILL, as for want of memory; started again it goes on, and pays only for what it had not paid."""

    def kill() -> None:
        stack.engine.run("kill", "--signal=KILL", stack.container("quiz"))
        time.sleep(2.0)
        if stack.state("quiz")["Status"] == "exited":  # an engine does not restart what its user killed
            stack.engine.run("start", stack.container("quiz"))

    adapter, bill = disturbed(stack, kill)
    assert adapter == calm[0]
    assert bill.keys() >= calm[1].keys()


def address(stack: Stack, service: str) -> str:
    """Where the engine put a service."""
    found = json.loads(stack.engine.run("inspect", stack.container(service)))[0]["NetworkSettings"][
        "Networks"
    ]
    return str(next(iter(found.values()))["IPAddress"])
