"""A cloud that answers every step in form and lies in what it says: receipts, values, seconds.

The real cloud answers; the lie is put into its reply behind the seal, where only the edge's own judgement can
find it.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from support.cached_runs import cached_recipe, losses, save_model, train_over
from support.fake_run import fake_run
from support.in_process import Fault, FaultyChannel, InProcessChannel, InProcessCloud
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.backbone import Segments
from tightbeam.common.errors import NonFiniteError
from tightbeam.edge.cache import verify_cache
from tightbeam.edge.cache.rows import pack_entry
from tightbeam.edge.link.carrier import RetryPolicy
from tightbeam.edge.link.channel import Channel, Exchange
from tightbeam.edge.link.stepper import Stepper
from tightbeam.edge.recipe import Codecs
from tightbeam.edge.report.meter import JsonlLedger, read_ledger
from tightbeam.edge.report.report import to_html
from tightbeam.edge.report.summary import summarise
from tightbeam.edge.report.table import print_table
from tightbeam.edge.report.units import bytes_text
from tightbeam.proto import backbone_pb2 as pb

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Lie = Callable[[Exchange], None]


class Lying:
    """A channel to the real cloud whose replies are altered before the edge sees them."""

    def __init__(self, inner: Channel, lie: Lie) -> None:
        self._inner, self._lie = inner, lie

    def submit(self, header: pb.StepRequest, payloads: list[Tensor]) -> Future[Exchange]:
        """Send a request; lie about the answer."""
        future = self._inner.submit(header, payloads)
        self._lie(future.result(timeout=60))
        return future

    def close(self) -> None:
        """Close the channel behind."""
        self._inner.close()


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCloud]:
    folder = tmp_path_factory.mktemp("lying")
    save_model(folder / "model")
    with InProcessCloud(folder / "model", folder / "cloud") as cloud:
        yield cloud


def _forward(cloud: InProcessCloud, run: str, lie: Lie, *faults: Fault) -> StepRow:
    rows: list[StepRow] = []
    script = deque(faults)

    def open_channel() -> Channel:
        return Lying(FaultyChannel(cloud.open_channel(run, "1:1"), script, lambda: None), lie)

    policy = RetryPolicy(first_wait_s=0.0)
    stepper = Stepper(
        run, open_channel, Codecs.model_validate("fp32"), trunk_dtype="float32", max_tokens_per_step=99,
        on_row=rows.append, on_retry=lambda line: None, policy=policy,
    )  # fmt: skip
    stepper.forward(torch.ones(5, 16), Segments((5,), torch.arange(5)), keep=True)
    stepper.close()
    return rows[0]


def _receipt(value: int) -> Lie:
    def lie(exchange: Exchange) -> None:
        receipt = exchange.reply.header.billed_before
        for field in receipt.DESCRIPTOR.fields:
            setattr(receipt, field.name, value)

    return lie


@pytest.mark.parametrize("claim", [2**64 - 1, 1, 5_000])
def test_the_edges_own_count_stands_against_a_receipt(cloud: InProcessCloud, claim: int) -> None:
    honest = _forward(cloud, f"honest {claim}", lambda exchange: None)
    row = _forward(cloud, f"receipt {claim}", _receipt(claim))
    assert row.bytes.payload_up_bytes == honest.bytes.payload_up_bytes == 5 * 16 * 4
    assert row.bytes.wire_total_bytes == pytest.approx(honest.bytes.wire_total_bytes, abs=99)
    assert (honest.disputed_bytes, row.disputed_bytes) == (0, 2 * claim)


def test_a_true_receipt_is_no_dispute(cloud: InProcessCloud) -> None:
    row = _forward(cloud, "true", lambda exchange: None, Fault.REPLY_LOST)
    assert (row.attempts, row.disputed_bytes) == (2, 0)
    assert row.resent_bytes > 0


def test_the_report_shows_a_dispute(tmp_path: Path) -> None:
    run, shown = fake_run(tmp_path / "run"), StringIO()
    before = summarise([run])
    rows = read_ledger(run / "ledger.jsonl")
    first = next(row for row in rows if row["row"] == "step")
    (run / "ledger.jsonl").unlink()
    with JsonlLedger(run / "ledger.jsonl") as ledger:
        for row in rows:
            ledger.append(row | ({"disputed_bytes": 2**65} if row is first else {}))
    after = summarise([run])
    assert after.edges[0].disputed_bytes == 2**65
    assert after.total.bytes == before.total.bytes
    assert after.bill == before.bill
    print_table(after, Console(file=shown, width=9999))
    assert "In dispute: the cloud's receipts for run name" in shown.getvalue()
    assert f"receipts for run name {bytes_text(2**65)} for steps" in to_html(after)
    assert "In dispute" not in to_html(before)


def _poison(exchange: Exchange) -> None:
    _, payload = exchange.reply.coded("hidden")
    payload[4:8] = torch.tensor([0, 0, 0xC0, 0x7F], dtype=torch.uint8)  # NaN in float32


def test_an_answer_of_nan_is_the_clouds_doing(cloud: InProcessCloud) -> None:
    with pytest.raises(NonFiniteError, match="The cloud answered step 0 with NaN or Inf") as caught:
        _forward(cloud, "nan", _poison)
    assert "operator" in caught.value.cure
    assert "lr" not in caught.value.cure


def test_nan_never_enters_a_cache(
    cloud: InProcessCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that met it ends; the next, on the same cache and an honest cloud, is as if it had not been."""
    recipe = cached_recipe(tmp_path / "one", cache={"dir": str(tmp_path / "cache")})
    clean = cached_recipe(tmp_path / "two", cache={"dir": str(tmp_path / "cache")})
    apart = cached_recipe(tmp_path / "three")
    honest: Callable[..., InProcessChannel] = cloud.open_channel
    with monkeypatch.context() as patch:
        patch.setattr(cloud, "open_channel", lambda run, cut: Lying(honest(run, cut), _poison))
        with pytest.raises(NonFiniteError, match="The cloud answered"):
            train_over(cloud, recipe)
    again, _ = train_over(cloud, clean)
    alone, _ = train_over(cloud, apart)
    assert losses(again.folder) == losses(alone.folder)
    assert verify_cache(tmp_path / "cache", b"s" * 32)[1] == []


@pytest.mark.parametrize("mode", ["top", "side"])
def test_nan_that_an_older_version_kept_is_found_and_fetched_again(
    cloud: InProcessCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    shape = {"mode": mode, "cache": {"dir": str(tmp_path / "cache")}, "side": {"taps": 0}}
    calls = itertools.count()

    def damaged(*arguments: Any) -> bytes:
        entry = pack_entry(*arguments)
        return entry[:5] + b"\0\0\xc0\x7f" + entry[9:] if next(calls) == 4 else entry

    with monkeypatch.context() as patch:
        patch.setattr("tightbeam.edge.cache.shortcut.pack_entry", damaged)
        first, crossing = train_over(cloud, cached_recipe(tmp_path / "first", **shape))
    assert "Its sample is fetched again" in crossing.said
    _, problems = verify_cache(tmp_path / "cache", b"s" * 32)
    assert len(problems) == 1
    assert "holds NaN or Inf" in problems[0]
    second, _ = train_over(cloud, cached_recipe(tmp_path / "second", **shape))
    assert losses(second.folder) == losses(first.folder)
