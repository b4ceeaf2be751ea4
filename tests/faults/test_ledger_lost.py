"""A cloud that cannot bill does not compute, and says so where operators look; what is no step is no row."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import create_engine, text

from support.abuser import Abuser, own_channel
from support.commands import Cloud, run_command
from support.postgres import postgres_url
from support.split_runs import split_run
from tightbeam.common import health as probe
from tightbeam.common.errors import LedgerError, ProtocolError, UsageError
from tightbeam.edge import connect
from tightbeam.edge.link.channel import error_from_rpc
from tightbeam.proto import backbone_pb2 as pb

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def watchful_cloud() -> None:
    """Runs in the cloud's process: it looks at its ledger ten times a second."""
    from tightbeam.cloud import server

    server._WATCH_S = 0.1


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with Cloud(model, tmp_path_factory.mktemp("cloud")) as process:
        yield process


def health(cloud: Cloud) -> int:
    with own_channel(cloud.address) as channel:
        request = health_pb2.HealthCheckRequest(service="tightbeam.v1.Backbone")
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)


def test_a_ledger_that_is_removed_ends_billing_and_computing(model: Path, tmp_path: Path) -> None:
    with Cloud(model, tmp_path / "cloud", before=watchful_cloud) as cloud:
        with split_run(cloud.address) as run:
            assert run.gradients()
            assert health(cloud) == SERVING
            os.unlink(tmp_path / "cloud" / "ledger.db")
            with pytest.raises(LedgerError, match=r"lost its ledger: it was removed.*Nothing was billed"):
                run.gradients(1)
            assert run.retries == []
            cloud.command.wait_until(lambda: health(cloud) == NOT_SERVING)
            assert probe.serves(cloud.address, None) == "NOT_SERVING"
        assert cloud.log.count("lost its ledger") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no database\n" * 999, "not a database"), (b"SQLite format 3\0" + b"\xa5" * 8192, "")],
)
def test_what_is_no_ledger_is_refused_in_one_line(
    model: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "ledger.db").write_bytes(content)
    ended = run_command(
        tmp_path,
        "serve",
        "--model",
        str(model),
        "--listen",
        "127.0.0.1:0",
        "--insecure",
        "--ledger",
        "ledger.db",
    )
    assert ended.code == 2
    assert said in ended.error
    assert ended.out == ""


def test_a_cloud_bills_into_postgresql(model: Path, tmp_path: Path) -> None:
    url = postgres_url()
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE IF EXISTS steps, runs"))
        with (
            Cloud(model, tmp_path / "cloud", "--ledger", url, before=watchful_cloud) as cloud,
            split_run(cloud.address) as run,
        ):
            assert run.gradients()
            run.assert_accounts_agree()
            with engine.begin() as connection:
                rows = connection.execute(text("SELECT run, step, kind FROM steps ORDER BY kind")).all()
                assert [tuple(row) for row in rows] == [
                    (run.cloud.run, 0, "backward"),
                    (run.cloud.run, 0, "forward"),
                ]
                connection.execute(text("DROP TABLE steps"))
            cloud.command.wait_until(lambda: health(cloud) == NOT_SERVING)
    finally:
        engine.dispose()


@pytest.mark.parametrize("step", [2**63, 2**64 - 1])
def test_a_step_number_that_no_ledger_holds(shared: Cloud, step: int) -> None:
    with own_channel(shared.address) as channel:
        client = Abuser(channel, "counter")
        session = client.handshake()
        with pytest.raises(grpc.RpcError) as caught:
            next(client.stream(session, client.records(session, client.forward(8, step))))
        assert isinstance(error_from_rpc(caught.value), ProtocolError)
        last = client.handshake()  # negative control: the last one that it holds
        assert next(client.stream(last, client.records(last, client.forward(8, 2**63 - 1))))


@pytest.mark.parametrize("method", ["Describe", "Download", "Handshake", "Usage"])
def test_what_is_no_message_is_refused_in_one_line(shared: Cloud, method: str) -> None:
    with own_channel(shared.address) as channel:
        call: Any = channel.unary_stream(f"/tightbeam.v1.Backbone/{method}")
        for raw in (b"\xff", b"\x0a\xff\xff\xff\x7f", os.urandom(64) + b"\xff"):
            with pytest.raises(grpc.RpcError) as caught:
                next(call(raw, timeout=10))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "This is no " in str(error_from_rpc(caught.value))
    assert "Traceback" not in shared.log


@pytest.mark.parametrize("run", ["line\nbreak", "nul\0", "\x1b[2Jclear"])
def test_a_run_is_named_in_printable_characters(shared: Cloud, run: str) -> None:
    with connect(shared.address, insecure=True, run=run) as edge, pytest.raises(UsageError, match="control"):
        edge._open_stream("1:1")
    with connect(shared.address, insecure=True, run="Klinik Süd 3") as edge:
        edge._open_stream("1:1").close()


def test_three_thousand_runs_come_in_pages(tiny_cloud: Callable[[str], "object"]) -> None:
    from support.in_process import InProcessCloud

    cloud = tiny_cloud("llama")
    assert isinstance(cloud, InProcessCloud)
    names = [f"run-{number:04}-{'x' * 200}" for number in range(3000)]
    for name in names:
        cloud.ledger._add_up(("insecure/busy", name), {"tokens": 1})
    cloud.ledger._connection.commit()
    with own_channel(cloud.address) as channel:
        client = Abuser(channel, "busy")
        page = client.stub.Usage(pb.UsageRequest(), metadata=client.metadata)
        assert page.more
        assert page.ByteSize() < 1 << 17
        asked = pb.UsageRequest(runs=names[:101])
        with pytest.raises(grpc.RpcError) as caught:
            client.stub.Usage(asked, metadata=client.metadata)
        assert isinstance(error_from_rpc(caught.value), UsageError)
    with connect(cloud.address, insecure=True, name="busy") as edge:
        assert [usage.run for usage in edge.usage()] == names
