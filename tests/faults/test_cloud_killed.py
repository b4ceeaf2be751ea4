"""The cloud dies by SIGKILL at any moment and comes back on its port and ledger: same bits, one bill."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from support.commands import Cloud
from support.mitm import Fault, Mitm, Way
from support.split_runs import SplitRun, same, split_run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SHORT, KILLS = 12, 20


@pytest.fixture
def cloud(model: Path, tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(model, tmp_path / "cloud") as process:
        yield process


def restart(cloud: Cloud) -> None:
    cloud.kill()
    cloud.start()


def undisturbed(cloud: Cloud) -> tuple[dict[str, Tensor], SplitRun]:
    with split_run(cloud.address) as run:
        return run.gradients(), run


def test_between_forward_and_backward(cloud: Cloud) -> None:
    expected, calm = undisturbed(cloud)
    with split_run(cloud.address) as run:
        assert same(run.gradients(between=lambda: restart(cloud)), expected)
        run.assert_accounts_agree()
        assert [(row.kind, row.step) for row in run.rows] == [("forward", 0), ("backward", 0)]
        usage = run.usage()
        assert (usage.forward_steps, usage.backward_steps, usage.reexecuted_steps) == (1, 1, 0)
        # the backward brought its inputs along, which the cloud had lost: they were paid for by the forward
        assert run.rows[1].bytes.payload_up_bytes == calm.rows[1].bytes.payload_up_bytes
        assert run.rows[1].resent_bytes > calm.rows[0].bytes.payload_up_bytes
        assert run.rows[0].bytes == calm.rows[0].bytes
    assert any("does not answer" in line or "closed" in line for line in run.retries)


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_during_a_step(cloud: Cloud, way: Way, number: int) -> None:
    """Killed when record `number` passes by: before, within and after a forward or backward."""
    expected, calm = undisturbed(cloud)
    killed = threading.Event()

    def kill_once(seen: Way, at: int) -> None:
        if (seen, at) == (way, number) and not killed.is_set():
            cloud.kill()
            killed.set()  # not before: the next one needs its port

    with Mitm(cloud.address) as mitm, split_run(mitm.address) as run:
        mitm.on_record = kill_once
        mitm.faults = [Fault("swallow", way, number + 1)]  # what it had sent by then dies on the way

        def revive() -> None:
            killed.wait(30)
            cloud.start()

        reviver = threading.Thread(target=revive)
        reviver.start()
        assert same(run.gradients(), expected)
        reviver.join()
        run.assert_accounts_agree()
        assert (run.usage().forward_steps, run.usage().backward_steps) == (1, 1)
        assert run.usage().tokens == calm.rows[0].tokens * 2
        if (way, number) != ("down", 3):  # then the whole reply was out already
            assert run.retries


def test_twenty_times_at_random_moments_of_a_training(cloud: Cloud) -> None:
    """The seed fixes how long each life lasts; what it hits within a step is up to the machine."""
    with split_run(cloud.address) as calm:
        expected = calm.train(SHORT)
    lives, done = random.Random(7), threading.Event()
    kills = 0

    def murder() -> None:
        nonlocal kills
        while kills < KILLS:
            time.sleep(lives.uniform(0.0, 0.3))
            restart(cloud)
            kills += 1
        done.set()

    with split_run(cloud.address) as run:
        murderer = threading.Thread(target=murder)
        murderer.start()
        adapter = run.train(SHORT)
        extra = 0
        while not done.is_set():  # a fast machine trains on until all lives are spent
            run.gradients(SHORT + extra)
            extra += 1
        murderer.join()
        assert same(adapter, expected)
        run.assert_accounts_agree()
        assert run.usage().forward_steps == SHORT + extra
    assert kills == KILLS
    assert len(run.retries) >= KILLS // 2
