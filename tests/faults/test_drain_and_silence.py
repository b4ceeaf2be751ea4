"""A cloud that is told to stop finishes what it has begun; one that falls silent is noticed."""

import signal
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.commands import Cloud
from support.hangs import HangingProxy
from support.split_runs import QUICK, same, split_run
from tightbeam.common.wire.lines import PATIENCE_S

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def slow_device() -> None:
    """Runs in the cloud's process: its device takes a second longer for a forward."""
    from tightbeam.cloud import engine

    fast = engine.Engine._forward

    def slow(self: engine.Engine, *args: object) -> object:
        time.sleep(1.0)
        return fast(self, *args)  # type: ignore[arg-type]  # passed through as they came

    engine.Engine._forward = slow  # type: ignore[method-assign,assignment]  # the slow device


def health(address: str) -> str:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="tightbeam.v1.Backbone")
        reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def test_sigterm_finishes_the_step_in_flight_and_the_edge_goes_on_after_a_restart(
    model: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    with Cloud(model, tmp_path / "cloud", before=slow_device) as cloud:
        with split_run(cloud.address) as calm:
            expected = calm.gradients()
        assert health(cloud.address) == "SERVING"

        def drain() -> None:
            time.sleep(0.5)  # the forward is on the device now
            cloud.command.signal(signal.SIGTERM)
            time.sleep(0.2)
            seen.append(health(cloud.address))
            seen.append(str(cloud.command.wait().code))
            cloud.start()

        with split_run(cloud.address) as run:
            operator = threading.Thread(target=drain)
            operator.start()
            assert same(run.gradients(), expected)
            operator.join()
            assert seen == ["NOT_SERVING", "0"]
            assert [(row.kind, row.attempts > 1) for row in run.rows] == [
                ("forward", False),
                ("backward", True),
            ]
            assert run.usage().reexecuted_steps == 0
            run.assert_accounts_agree()


@pytest.mark.slow
def test_a_path_that_goes_dead_is_noticed(model: Path, tmp_path: Path) -> None:
    with (
        Cloud(model, tmp_path / "cloud") as cloud,
        HangingProxy(cloud.port) as proxy,
        split_run(proxy.address, policy=type(QUICK)()) as run,  # no limit of its own on silence
    ):
        expected = run.gradients()
        proxy.hang()
        started_s = time.monotonic()
        assert same(run.gradients(), expected)
        assert time.monotonic() - started_s < PATIENCE_S + 30
        assert "does not answer" in run.retries[0]
        run.assert_accounts_agree()
