"""Someone between edge and cloud changes records: it is named, nothing wrong is used, training goes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.commands import Cloud
from support.mitm import Fault, Kind, Mitm, Way
from support.split_runs import QUICK, batch, same, split_run
from tightbeam.common.errors import CloudUnavailableError, IntegrityError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with Cloud(model, tmp_path_factory.mktemp("cloud")) as process:
        yield process


@pytest.fixture
def mitm(cloud: Cloud) -> Iterator[Mitm]:
    with Mitm(cloud.address) as proxy:
        yield proxy


@pytest.fixture
def undisturbed(cloud: Cloud) -> dict[str, Tensor]:
    with split_run(cloud.address) as run:
        return run.gradients()


KINDS: tuple[Kind, ...] = ("flip", "drop", "double", "reorder", "truncate")


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_record_ends_the_session_and_the_step_goes_through_on_a_fresh_one(
    mitm: Mitm, undisturbed: dict[str, Tensor], kind: Kind, way: Way
) -> None:
    mitm.faults = [Fault(kind, way, record=0)]
    with split_run(mitm.address) as run:
        assert same(run.gradients(), undisturbed)
        assert mitm.streams == 2
        (line,) = run.retries
        assert "does not authenticate" in line
        assert "altered 1 of at most 3 times" in line
        assert [row.attempts for row in run.rows] == [2, 1]
        run.assert_accounts_agree()
        assert run.usage().reexecuted_steps == (way == "down")  # up: the cloud never saw a whole step


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("record", [1, 2, 3])
def test_a_flip_anywhere_in_either_step_is_noticed(
    mitm: Mitm, undisturbed: dict[str, Tensor], way: Way, record: int
) -> None:
    mitm.faults = [Fault("flip", way, record)]
    with split_run(mitm.address) as run:
        assert same(run.gradients(), undisturbed)
        assert "does not authenticate" in run.retries[0]
        run.assert_accounts_agree()


def test_a_proxy_that_changes_nothing_is_not_noticed(mitm: Mitm, undisturbed: dict[str, Tensor]) -> None:
    with split_run(mitm.address) as run:
        assert same(run.gradients(), undisturbed)
        assert (mitm.streams, run.retries) == (1, [])
        assert len(mitm.records) == 8


@pytest.mark.parametrize("way", ["up", "down"])
def test_one_who_never_stops_is_given_up_after_the_printed_limit(mitm: Mitm, way: Way) -> None:
    mitm.faults = [Fault("flip", way, record=1, streams=1000)]
    with split_run(mitm.address) as run:
        with pytest.raises(IntegrityError, match="does not authenticate") as caught:
            run.gradients()
        assert caught.value.exit_code == 5
        assert [f"altered {n} of at most 3 times" in line for n, line in enumerate(run.retries, 1)] == [
            True
        ] * 3
        assert mitm.streams == 4
        mitm.faults = []
        assert run.gradients()  # the run itself is unharmed


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_last_record_that_never_comes_is_not_waited_for_for_ever(
    mitm: Mitm, undisturbed: dict[str, Tensor], way: Way
) -> None:
    """Nothing follows that could fail to authenticate, so silence has to tell."""
    mitm.faults = [Fault("drop", way, record=1)]
    with split_run(mitm.address) as run:
        assert same(run.gradients(), undisturbed)
        assert "The cloud has sent nothing for 5 s." in run.retries[0]
        run.assert_accounts_agree()


def test_nothing_of_the_batch_is_on_the_wire_in_clear(mitm: Mitm) -> None:
    seen: list[bytes] = []
    passing = mitm._tampered

    def listening(records: Iterator[bytes], way: Way, faults: list[Fault]) -> Iterator[bytes]:
        for record in passing(records, way, faults):
            seen.append(record)
            yield record

    mitm._tampered = listening  # type: ignore[method-assign]  # the wiretap
    with split_run(mitm.address) as run:
        hidden_BTD = run.model.get_input_embeddings()(batch(0)["input_ids"])
        run.gradients()
    assert len(seen) == 8
    row = hidden_BTD[0, 0].detach().to(torch.float32).numpy().tobytes()
    assert not any(row in record for record in seen)


def test_a_cloud_that_stays_away_is_given_up_with_the_limit_printed(cloud: Cloud, mitm: Mitm) -> None:
    policy = type(QUICK)(first_wait_s=0.05, longest_wait_s=0.2, give_up_after_s=1.0)
    with split_run(mitm.address, policy=policy) as run:
        mitm._channel.close()
        mitm._server.stop(0).wait()
        with pytest.raises(CloudUnavailableError, match="does not answer") as caught:
            run.gradients()
    assert caught.value.exit_code == 6
    assert len(run.retries) > 1
    assert "for up to 1 s more" in run.retries[0]
