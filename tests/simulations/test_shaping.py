"""A shaped line is as slow as its profile says, never faster, and changes no byte."""

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from support.federations import Playground
from tightbeam.common.errors import UsageError
from tightbeam.edge.report.meter import read_ledger
from tightbeam.federation.profiles import NetworkProfile
from tightbeam.simulations.shaping import ShapedLine, require_local

SLACK_S = 2.0  # machines that test are busy; what matters is that nothing comes too early


@pytest.fixture
def echo() -> Iterator[str]:
    """Address of a server that sends back what it gets, and then ends."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def dial(line: ShapedLine) -> socket.socket:
    host, port = line.address.split(":")
    return socket.create_connection((host, int(port)))


def exchange(line: ShapedLine, data: bytes) -> tuple[bytes, float]:
    """What comes back, and the seconds until the last byte of it."""
    began_s, received = time.monotonic(), bytearray()
    with dial(line) as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        while len(received) < len(data):
            received += sock.recv(1 << 16)
        took_s = time.monotonic() - began_s
        sender.join()
    return bytes(received), took_s


def test_an_exchange_of_a_byte_takes_a_round_trip(echo: str) -> None:
    with ShapedLine(echo, NetworkProfile(up_mbps=100, down_mbps=100, rtt_ms=200)) as line:
        back, took_s = exchange(line, b"x")
    assert back == b"x"
    assert 0.2 <= took_s < 0.2 + SLACK_S


@pytest.mark.parametrize(("up_mbps", "down_mbps"), [(4, 400), (400, 4)])
def test_bytes_come_at_the_lines_rate_and_unchanged(echo: str, up_mbps: float, down_mbps: float) -> None:
    data = os.urandom(200_000)
    with ShapedLine(echo, NetworkProfile(up_mbps=up_mbps, down_mbps=down_mbps, rtt_ms=0)) as line:
        back, took_s = exchange(line, data)
    assert back == data
    assert 0.4 <= took_s < 0.4 + SLACK_S


def test_a_sender_has_to_wait_for_the_line(echo: str) -> None:
    """Nothing is taken from the sender long before its turn: the relay is no bottomless buffer."""
    with ShapedLine(echo, NetworkProfile(up_mbps=1, down_mbps=100, rtt_ms=0)) as line, dial(line) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(50_000_000))


def test_connections_share_the_line(echo: str) -> None:
    data, began_s = bytes(100_000), time.monotonic()
    with ShapedLine(echo, NetworkProfile(up_mbps=4, down_mbps=400, rtt_ms=0)) as line:
        threads = [threading.Thread(target=exchange, args=(line, data)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert time.monotonic() - began_s >= 0.4  # one of them alone: 0.2


def test_a_target_that_is_not_there_hangs_up() -> None:
    network = NetworkProfile(up_mbps=4, down_mbps=4, rtt_ms=0)
    with ShapedLine("127.0.0.1:9", network) as line, dial(line) as sock:
        sock.settimeout(5)
        assert sock.recv(1) == b""


def test_a_cloud_elsewhere_is_refused() -> None:
    require_local("localhost:50051")
    with pytest.raises(UsageError, match=r"cloud on this machine; cloud\.example:50051 is elsewhere"):
        require_local("cloud.example:50051")


def test_steps_over_shaped_lines_take_what_the_model_says(playground: Playground) -> None:
    slow = {"up_mbps": 2, "down_mbps": 4, "rtt_ms": 40}
    scenario, plain = (
        playground.scenario(clients=2, rounds=1, client={"cut": "1:1", "r": 4, "network": slow})
        for _ in range(2)
    )
    playground.run(scenario, shape=True)
    playground.run(plain)
    rows, unshaped = (playground.rows(one, "client_round") for one in (scenario, plain))
    for row in rows:
        steps = [
            step
            for step in read_ledger(scenario.folder / "clients" / row["client"] / "ledger.jsonl")
            if step["row"] == "step" and step["run"] == row["run"]
        ]
        bytes_s = sum(s["wire_up_bytes"] / 250e3 + s["wire_down_bytes"] / 500e3 for s in steps)
        assert row["network_virtual_s"] == pytest.approx(bytes_s + 0.04 * len(steps))
        assert row["network_s"] == pytest.approx(sum(step["network_s"] for step in steps))
        assert 0.95 * row["network_virtual_s"] < row["network_s"] < row["network_virtual_s"] + SLACK_S
    assert min(row["network_virtual_s"] / row["network_s"] for row in unshaped) > 1.5, "no need to shape"
    (line,) = playground.report(scenario)["lines"]
    everything = rows + playground.rows(scenario, "client_eval")
    assert (line["group"], line["clients"]) == ("", 2)
    assert line["measured_s"] == pytest.approx(sum(row["network_s"] for row in everything))
    assert line["virtual_s"] == pytest.approx(sum(row["network_virtual_s"] for row in everything))
    assert "Lines, measured" in (scenario.folder / "report.html").read_text(encoding="utf-8")
    assert playground.report(plain)["lines"] == []
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in unshaped]
    for name, array in playground.state(plain).items():
        assert (playground.state(scenario)[name] == array).all(), "another line is no other arithmetic"


def test_shaping_a_cloud_elsewhere_is_told_at_once(playground: Playground) -> None:
    elsewhere = {"address": "cloud.example:1", "identities": "nowhere"}
    with pytest.raises(UsageError, match="Leave --shape out"):
        playground.run(playground.scenario(cloud=elsewhere), shape=True)
