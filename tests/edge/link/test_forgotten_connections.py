"""A notebook's habit: connections that nobody closes. What they hold goes when they go."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from support.in_process import InProcessCloud
from tightbeam.edge import connect

IDS = torch.tensor([[3, 5, 8, 13]])
_UNTIL_S = 20.0


_OTHERS: set[threading.Thread] = set()  # threads of streams that tests before this one have open


def stream_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("tightbeam_")}


def holds(cloud: InProcessCloud) -> tuple[int, int]:
    """Open streams in the cloud, and threads of streams at the edge."""
    return len(cloud.service._streams), len(stream_threads() - _OTHERS)


def wait_until(done: Callable[[], bool]) -> None:
    until_s = time.monotonic() + _UNTIL_S
    while not done():
        assert time.monotonic() < until_s, "what was forgotten is still held"
        time.sleep(0.05)


@pytest.fixture
def cloud(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Iterator[InProcessCloud]:
    _OTHERS.update(stream_threads())
    with InProcessCloud(tiny_folder("llama"), tmp_path) as cloud:
        cloud.listen()
        yield cloud


def test_more_models_than_a_tenant_may_have_streams(cloud: InProcessCloud) -> None:
    for number in range(40):
        connect(cloud.address, insecure=True).open_steps("1:1").probe(cloud.card.hidden_size)
        if number % 10 == 9:
            gc.collect()
    wait_until(lambda: holds(cloud) == (0, 0))


def test_a_model_that_is_still_there_keeps_its_stream(cloud: InProcessCloud) -> None:
    model = connect(cloud.address, insecure=True).load_model("1:1")  # only the model has a name
    with torch.no_grad():
        before = model(IDS).logits
        gc.collect()
        time.sleep(1.0)  # longer than a stream takes to see that it is forgotten
        assert holds(cloud) == (1, 2)
        assert torch.equal(model(IDS).logits, before)
    del model
    gc.collect()
    wait_until(lambda: holds(cloud) == (0, 0))


def test_one_of_two_models_of_a_connection(cloud: InProcessCloud) -> None:
    with connect(cloud.address, insecure=True) as connection, torch.no_grad():
        kept, forgotten = (connection.load_model("1:1") for _ in range(2))
        kept(IDS), forgotten(IDS)
        assert holds(cloud) == (2, 4)
        del forgotten
        gc.collect()
        wait_until(lambda: holds(cloud) == (1, 2))
        kept(IDS)
