"""What another tenant's misbehaviour does to an honest tenant's steps, attack by attack.

One cloud on loopback, a random Llama. The honest tenant sends forward and backward of one step after the
other; blocks of steps alone and beside the attack alternate within one run, so a drifting machine moves both.
The attacker is a process of its own at the lowest priority: its own arithmetic belongs to another machine.
The ledger begins with rows of the attacker's, for its questions to go over.

    PYTHONPATH=tests python -m benchmarks.hostile_tenant > hostile.md
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import grpc
import numpy as np
import sqlalchemy as sa
import torch
from benchmarks.serving import cloud_process
from transformers import LlamaConfig, LlamaForCausalLM

from support.abuser import Abuser, own_channel
from tightbeam.cloud.ledger_store import STEPS, Store
from tightbeam.common.backbone import Segments
from tightbeam.common.errors import TightbeamError
from tightbeam.edge import connect
from tightbeam.edge.link.stepper import Stepper
from tightbeam.proto import backbone_pb2 as pb

HIDDEN, TOKENS = 128, 128


def usage(abuser: Abuser) -> list[Any]:
    """Eight questions at a time about what it has used."""
    calls = [abuser.stub.Usage.future(pb.UsageRequest(), metadata=abuser.metadata) for _ in range(8)]
    for call in calls:
        call.exception()
    return []


def downloads(abuser: Abuser) -> list[Any]:
    """A hundred downloads of the largest blob that it does not read."""
    blob = max(abuser.card.blobs, key=lambda blob: blob.num_bytes)
    request = pb.DownloadRequest(sha256=blob.sha256)
    return [abuser.stub.Download(request, metadata=abuser.metadata) for _ in range(100)]


def trickle(abuser: Abuser) -> list[Any]:
    """Steps as large as the cloud takes, a record a second."""
    return [abuser.half_a_step(65_000, pause_s=1.0) for _ in range(4)]


def deaf(abuser: Abuser) -> list[Any]:
    """Sixteen streams of steps whose answers it does not read."""

    def stream() -> Any:
        session = abuser.handshake(f"run-{time.monotonic_ns()}")
        records = (abuser.records(session, abuser.forward(TOKENS, step)) for step in range(100))
        return abuser.stream(session, itertools.chain.from_iterable(records))

    return [stream() for _ in range(16)]


def forwards(abuser: Abuser) -> list[Any]:
    """Eighty forwards to hold, whose backwards never come; the answers are read."""
    session = abuser.handshake(f"run-{time.monotonic_ns()}")
    steps = (abuser.forward(TOKENS, step, keep=True) for step in range(80))
    call = abuser.stream(session, itertools.chain.from_iterable(abuser.records(session, s) for s in steps))
    for _ in range(80 * 2):
        next(call)
    return [call]


ATTACKS: dict[str, Callable[[Abuser], list[Any]]] = {
    "questions about usage": usage,
    "unread downloads": downloads,
    "trickling giant steps": trickle,
    "edges that never read": deaf,
    "forwards to hold": forwards,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=8, help="blocks of each kind")
    parser.add_argument("--steps", type=int, default=50, help="in a block")
    parser.add_argument("--ledger-rows", type=int, default=1_000_000, help="of the attacker's, beforehand")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _model(folder / "model")
        _fill(folder / "ledger.db", arguments.ledger_rows)
        options = ("--insecure", "--retention-bytes", str(1 << 28))
        print("| attack | alone: p50, p99 ms | beside it: p50, p99 ms | p99 ratio | failed steps |")
        print("|---|---|---|---|---|")
        with (
            cloud_process(model, folder, *options) as address,
            connect(address, insecure=True, name="honest", on_retry=lambda line: None) as cloud,
        ):
            stepper = cloud.open_steps("1:1")
            _block(stepper, 20)
            for attack in ATTACKS:
                _compare(stepper, address, attack, arguments.rounds, arguments.steps)
    print(
        f"\n{arguments.rounds} x {arguments.steps} steps of {TOKENS} tokens each way, hidden size {HIDDEN}, "
        f"{arguments.ledger_rows:,} ledger rows; {os.cpu_count()} x {platform.machine()}, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def _compare(stepper: Stepper, address: str, attack: str, rounds: int, steps: int) -> None:
    alone: list[float] = []
    beside: list[float] = []
    with _attacker(address, attack) as active:
        for _ in range(rounds):
            alone += _block(stepper, steps)
            active.set()
            time.sleep(0.5)
            beside += _block(stepper, steps)
            active.clear()
            time.sleep(0.5)
    one, other = (np.percentile(seconds, [50, 99]) * 1e3 for seconds in (alone, beside))
    failed = sum(second == float("inf") for second in beside)
    print(
        f"| {attack} | {one[0]:.1f}, {one[1]:.1f} | {other[0]:.1f}, {other[1]:.1f} | {other[1] / one[1]:.2f} "
        f"| {failed} |",
        flush=True,
    )


def _block(stepper: Stepper, steps: int) -> list[float]:
    segments = Segments((TOKENS,), torch.arange(TOKENS))
    hidden_ND, seconds = torch.randn(TOKENS, HIDDEN), []
    for _ in range(steps):
        started_s = time.perf_counter()
        try:
            out_ND, inputs = stepper.forward(hidden_ND, segments, keep=True)
            stepper.backward(inputs, out_ND)
        except TightbeamError:
            seconds.append(float("inf"))
        else:
            seconds.append(time.perf_counter() - started_s)
    return seconds


@contextlib.contextmanager
def _attacker(address: str, attack: str) -> Iterator[Event]:
    context = multiprocessing.get_context("spawn")
    active, ready = context.Event(), context.Event()
    process = context.Process(target=_attack, args=(address, attack, active, ready), daemon=True)
    process.start()
    ready.wait(120)
    try:
        yield active
    finally:
        process.kill()
        process.join()


def _attack(address: str, attack: str, active: Event, ready: Event) -> None:
    with contextlib.suppress(AttributeError):
        os.nice(19)  # not on Windows
    torch.set_num_threads(1)
    with own_channel(address) as channel:
        abuser = Abuser(channel, "hostile")
        ready.set()
        while True:
            active.wait()
            calls: list[Any] = []
            until_s = time.monotonic() + 2.0
            while active.is_set() and (time.monotonic() < until_s or any(call.is_active() for call in calls)):
                if not any(call.is_active() for call in calls):
                    with contextlib.suppress(grpc.RpcError, TightbeamError, StopIteration):
                        calls = ATTACKS[attack](abuser)
                threading.Event().wait(0.001)
            for call in calls:
                call.cancel()


def _model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1 << 16, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _fill(path: Path, rows: int) -> None:
    """Rows of the attacker's, as many as a long life leaves; the cloud sums them up when it starts."""
    store = Store(path)
    numbers = {column.name: 1 for column in STEPS.columns}
    columns = numbers | {
        "tenant": "insecure/hostile",
        "kind": "forward",
        "request_sha256": "",
        "retention": "hold",
    }
    for start in range(0, rows, 100_000):
        some = range(start, min(start + 100_000, rows))
        store.connection.execute(
            sa.insert(STEPS), [columns | {"run": f"run-{n // 100}", "step": n} for n in some]
        )
        store.connection.commit()
    store.close()


if __name__ == "__main__":
    main()
