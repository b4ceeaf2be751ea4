"""Stopwatches, peak memory and the edge's ledger file."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.common.errors import DataError
from tightbeam.edge.report.meter import JsonlLedger, StepMeter, peak_memory_bytes, read_ledger


def test_seconds_go_to_their_phase() -> None:
    meter = StepMeter()
    with meter.measure("codec"):
        time.sleep(0.02)
    with meter.measure("codec"):
        time.sleep(0.02)
    assert 0.04 <= meter.seconds("codec") < 1.0
    assert meter.seconds("seal") == 0.0


def test_a_failing_phase_is_counted_and_ends() -> None:
    meter = StepMeter()

    def fail() -> None:
        with meter.measure("network"):
            time.sleep(0.01)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert meter.seconds("network") >= 0.01
    with meter.measure("seal"):
        pass


def test_phases_must_not_nest() -> None:
    meter = StepMeter()
    with pytest.raises(AssertionError, match="nest"), meter.measure("codec"), meter.measure("seal"):
        pass


def test_the_cloud_takes_its_share_of_the_wait() -> None:
    meter = StepMeter()
    with meter.measure("network"):
        time.sleep(0.05)
    waited = meter.seconds("network")
    meter.cloud_spent(queue_s=0.01, compute_s=0.02)
    assert meter.seconds("network") == pytest.approx(waited - 0.03)
    assert (meter.seconds("queue"), meter.seconds("compute")) == (0.01, 0.02)


def test_network_time_is_never_negative() -> None:
    meter = StepMeter()
    meter.cloud_spent(queue_s=1.0, compute_s=1.0)
    assert meter.seconds("network") == 0.0


def test_rows_survive_json() -> None:
    meter = StepMeter()
    meter.cloud_spent(queue_s=0.5, compute_s=0.25)
    row = meter.row(
        run="a", step=3, kind="backward", tokens=9, segments=2,
        bytes=StepBytes(payload_up_bytes=1, wire_down_bytes=2), cloud_flops=10**15, attempts=2,
    )  # fmt: skip
    assert (row.cloud_queue_s, row.cloud_compute_s) == (0.5, 0.25)
    assert abs(row.time_unix_s - time.time()) < 60
    assert StepRow.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_peak_memory_sees_an_allocation_and_keeps_it() -> None:
    code = (
        "from tightbeam.edge.report.meter import peak_memory_bytes as peak\n"
        "before = peak(); block = bytearray(b'x') * 80_000_000; during = peak(); del block\n"
        "print(before, during, peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    assert during - before > 70_000_000
    assert after > during - 4_000_000  # the kernel's counters lag by some pages


def test_peak_memory_is_this_process_not_its_parent() -> None:
    """A small child of a large process must not report the parent's peak."""
    block = bytearray(b"x") * 300_000_000
    code = "from tightbeam.edge.report.meter import peak_memory_bytes as peak; print(peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(block) == 300_000_000
    assert int(done.stdout) < 300_000_000 < peak_memory_bytes()


def test_ledger_round_trip(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"row": "run", "run": "a"},
        {"row": "eval", "n": 0, "loss": 2.5, "name": "Über"},
    ]
    with JsonlLedger(tmp_path / "ledger.jsonl") as ledger:
        for row in rows:
            ledger.append(row)
            assert read_ledger(tmp_path / "ledger.jsonl")[-1] == row  # visible before the file is closed
    assert read_ledger(tmp_path / "ledger.jsonl") == rows


def test_reopened_it_goes_on(tmp_path: Path) -> None:
    for n in range(3):
        with JsonlLedger(tmp_path / "ledger.jsonl") as ledger:
            ledger.append({"row": "eval", "n": n})
    assert [row["n"] for row in read_ledger(tmp_path / "ledger.jsonl")] == [0, 1, 2]


def test_a_torn_last_line_is_left_out_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"row":"eval","n":0}\n{"row":"ev')
    with caplog.at_level(logging.WARNING):
        assert read_ledger(path) == [{"row": "eval", "n": 0}]
    assert "incomplete" in caplog.text


def test_a_torn_line_is_taken_out_before_writing_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"row":"eval","n":0}\n{"row":"ev')
    with JsonlLedger(path) as ledger:
        ledger.append({"row": "eval", "n": 1})
    assert [row["n"] for row in read_ledger(path)] == [0, 1]


@pytest.mark.parametrize(
    "line", ['{"row":"ev', "[]", '{"n":1}', ""], ids=["torn", "list", "no kind", "empty"]
)
def test_a_corrupt_line_inside_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(f'{{"row":"eval","n":0}}\n{line}\n{{"row":"eval","n":2}}\n')
    with pytest.raises(DataError, match=r"ledger\.jsonl:2 is not a ledger row"):
        read_ledger(path)


def test_a_missing_ledger_has_a_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tightbeam train"):
        read_ledger(tmp_path / "ledger.jsonl")


def test_not_a_number_is_no_row(tmp_path: Path) -> None:
    with JsonlLedger(tmp_path / "ledger.jsonl") as ledger, pytest.raises(ValueError, match="JSON"):
        ledger.append({"row": "eval", "loss": float("nan")})
