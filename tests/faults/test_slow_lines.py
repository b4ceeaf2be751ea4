"""A line that is slow, stalls or breaks carries a step and a download to their end, and little twice.

What decides are times: how long a ping waits behind data, and how long either end waits for it. The quick
tests keep their proportions: lines twenty times as fast, patience a twentieth.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from support.commands import Cloud
from support.counting_proxy import CountingProxy
from support.in_process import InProcessCloud
from support.tiny import tiny_model
from tightbeam.cloud import server
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.backbone import Segments
from tightbeam.edge import connect
from tightbeam.edge.link import connection
from tightbeam.edge.link.carrier import RetryPolicy
from tightbeam.edge.link.connection import Cloud as Connected
from tightbeam.federation.profiles import NetworkProfile
from tightbeam.simulations.shaping import ShapedLine

_LENGTHS = (64,) * 512  # 4.2 MB a tensor: 32 elements of 4 bytes per token
_TIMES = 20  # of the quick tests


@dataclass
class Edge:
    """An edge behind a line; the proxy before it counts, stalls and cuts."""

    cloud: Connected
    proxy: CountingProxy
    rows: list[dict[str, Any]]
    said: list[str]

    def step(self) -> StepRow:
        """A forward; its row."""
        segments = Segments(_LENGTHS, torch.arange(64).repeat(len(_LENGTHS)))
        hidden_ND = torch.randn(sum(_LENGTHS), 32, generator=torch.Generator().manual_seed(0))
        self.cloud.open_steps("1:2").forward(hidden_ND, segments, keep=False)
        return StepRow.from_json(self.rows[-1])


@contextlib.contextmanager
def _edge(address: str, mbps: float, policy: RetryPolicy | None = None) -> Iterator[Edge]:
    rows: list[dict[str, Any]] = []
    said: list[str] = []
    with (
        ShapedLine(address, NetworkProfile(up_mbps=mbps, down_mbps=mbps, rtt_ms=20)) as line,
        CountingProxy(int(line.address.rpartition(":")[2])) as proxy,
        connect(
            f"127.0.0.1:{proxy.port}", insecure=True, on_row=rows.append, on_retry=said.append, policy=policy
        ) as cloud,
    ):
        yield Edge(cloud, proxy, rows, said)


def _hastened(options: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(name, value // _TIMES if name.endswith("_ms") else value) for name, value in options]


@pytest.fixture
def hasty(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InProcessCloud]:
    """A cloud, and edges, whose every patience is a twentieth."""
    monkeypatch.setattr(connection, "_OPTIONS", _hastened(connection._OPTIONS))
    monkeypatch.setattr("support.in_process._OPTIONS", _hastened(server._OPTIONS))
    with InProcessCloud(tiny_folder("llama"), tmp_path, max_tokens_per_step=1 << 16) as cloud:
        cloud.listen()
        yield cloud


def test_a_step_over_a_slow_line_is_sent_once(hasty: InProcessCloud) -> None:
    with _edge(hasty.address, mbps=_TIMES * 1.0) as edge:
        needed = edge.step().bytes.wire_up_bytes
        assert edge.said == []
        assert 0.99 * needed < edge.proxy.up_bytes < 1.05 * needed


def test_a_long_step_that_breaks_off_is_tried_again(hasty: InProcessCloud) -> None:
    """Longer than the limit of retrying: its clock starts when the attempt has failed, not before."""
    policy = RetryPolicy(give_up_after_s=0.5, first_wait_s=0.1)
    with _edge(hasty.address, mbps=_TIMES * 1.0, policy=policy) as edge:
        with _when(edge.proxy, up_bytes=1_000_000, act=edge.proxy.cut):
            row = edge.step()
        assert (row.attempts, len(edge.said)) == (2, 1)
        assert edge.proxy.up_bytes < 1.05 * 2 * row.bytes.wire_up_bytes


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "cache"))
    tiny_model("llama", vocab_size=24_000).save_pretrained(tmp_path / "model")  # an embedding of 3 MB
    with (
        InProcessCloud(tmp_path / "model", tmp_path / "cloud") as cloud,
        _edge(cloud.listen(), mbps=20, policy=RetryPolicy(give_up_after_s=5.0, first_wait_s=0.1)) as edge,
    ):
        with _when(edge.proxy, down_bytes=2_500_000, act=edge.proxy.cut):
            edge.cloud.load_model("1:2")
        assert "Retrying the download of embedding for up to" in edge.said[0]
        needed = sum(blob.num_bytes for blob in edge.cloud.card.blobs if blob.name == "embedding")
        parts = [row["wire_down_bytes"] for row in edge.rows if row["name"] == "embedding"]
        assert len(parts) == 2
        assert needed < sum(parts) <= 1.05 * needed
        assert edge.proxy.down_bytes < 1.05 * needed + (1 << 20)  # the piece that broke off comes again


@pytest.mark.slow
@pytest.mark.parametrize(("mbps", "hurdle"), [(1, "none"), (1, "stall"), (3, "none"), (3, "reset")])
def test_steps_end_over_a_line_of_so_many_megabits(
    tiny_folder: Callable[[str], Path], tmp_path: Path, mbps: float, hurdle: str
) -> None:
    with Cloud(tiny_folder("llama"), tmp_path / "cloud") as cloud, _edge(cloud.address, mbps) as edge:
        acts = {"none": lambda: None, "stall": lambda: edge.proxy.stall(45.0), "reset": edge.proxy.cut}
        with _when(edge.proxy, up_bytes=1_000_000, act=acts[hurdle]):
            row = edge.step()
        assert row.attempts == (2 if hurdle == "reset" else 1)
        assert edge.proxy.up_bytes < 1.05 * row.attempts * row.bytes.wire_up_bytes
        assert edge.proxy.down_bytes < 1.05 * row.bytes.wire_down_bytes


@pytest.mark.slow
def test_a_download_ends_over_two_megabits(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=64_000).save_pretrained(tmp_path / "model")  # an embedding of 8 MB
    with Cloud(tmp_path / "model", tmp_path / "cloud") as cloud, _edge(cloud.address, mbps=2) as edge:
        edge.cloud.load_model("1:2")
        assert edge.said == []
        assert edge.proxy.down_bytes <= 1.05 * sum(row["wire_down_bytes"] for row in edge.rows)


@contextlib.contextmanager
def _when(
    proxy: CountingProxy, *, up_bytes: int = 0, down_bytes: int = 0, act: Callable[[], None]
) -> Iterator[None]:
    """Act as soon as so much has passed."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            if proxy.up_bytes >= up_bytes and proxy.down_bytes >= down_bytes:
                act()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    over.set()
    watcher.join()
