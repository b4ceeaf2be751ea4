"""What is shown while training, and what stop signals do."""

import io
import os
import signal
import threading
import time

import pytest
from rich.console import Console

from support.edge_runs import quiet
from tightbeam.edge.training.interrupts import StopRequest
from tightbeam.edge.training.progress import Notices, TrainingProgress


def _show(console: Console, total: int, first: int = 0) -> None:
    with TrainingProgress(console, total_steps=total, done_steps=first) as progress:
        for _ in range(first, total):
            progress.step(loss=1.25, tokens=10, wall_s=0.0, up_bytes=2_500_000, down_bytes=1_000_000)
        progress.say("evaluation [done]")


def test_a_terminal_gets_a_bar() -> None:
    text = io.StringIO()
    _show(Console(file=text, force_terminal=True, width=160), total=3)
    shown = text.getvalue()
    assert "3/3" in shown
    assert "loss 1.2500" in shown
    assert "2.5 MB up  1.0 MB down" in shown
    assert "evaluation [done]" in shown
    assert shown.count("\x1b[") > 3


@pytest.mark.parametrize(
    ("total", "first", "lines"), [(3, 0, 3), (100, 0, 21), (100, 95, 2), (1000, 500, 11)]
)
def test_elsewhere_lines_come_now_and_then(total: int, first: int, lines: int) -> None:
    console, text = quiet()
    _show(console, total, first)
    steps = [line for line in text.getvalue().splitlines() if line.startswith("step ")]
    assert len(steps) == lines
    assert steps[-1].startswith(f"step {total}/{total}  loss 1.2500")
    assert "\x1b" not in text.getvalue()


def test_the_time_left_does_not_count_an_evaluation_before_the_first_step() -> None:
    console, text = quiet()
    with TrainingProgress(console, total_steps=20, done_steps=0) as progress:
        time.sleep(0.3)  # an evaluation
        progress.step(loss=1.0, tokens=10, wall_s=0.0, up_bytes=0, down_bytes=0)
    (line,) = text.getvalue().splitlines()
    assert line.endswith("  0 s left")  # else 19 times 0.3 s
    assert int(line.split(" tokens/s")[0].rpartition(" ")[2]) > 10 / 0.3


def test_a_notice_is_one_line_and_says_what_the_loop_was_at() -> None:
    text = io.StringIO()
    notices = Notices(Console(file=text, width=20))
    notices("before any step [x]")
    notices.at = "step 3/20"
    notices("The cloud does not answer (a long reason). Retrying for up to 120 s more.")
    assert text.getvalue().splitlines() == [
        "before any step [x]",
        "step 3/20: The cloud does not answer (a long reason). Retrying for up to 120 s more.",
    ]


def test_the_first_signal_asks_and_the_second_stops() -> None:
    said: list[str] = []
    with StopRequest(lambda: said.append("stopping")) as stop:
        seen = [stop.requested]
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(stop.requested)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert seen == [False, True]
    assert said == ["stopping"]


def test_handlers_are_put_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), StopRequest(lambda: None):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_signals_stay_with_their_owner() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def train() -> None:
        with StopRequest(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]
