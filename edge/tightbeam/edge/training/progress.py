"""What a person sees while training: a live bar on a terminal, a plain line now and then elsewhere.

Everything goes to the console that the caller gives, which for the command line is stderr: stdout carries
answers only.
"""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Notices", "TrainingProgress", "say"]

_PLAIN_LINES = 20  # about how many lines a whole run prints where there is no terminal
_MEGABYTE = 1e6


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print one line, whole: where it goes to a file, whoever searches it must find it unbroken."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


class Notices:
    """Warnings from below the training loop, such as retries, each after what the loop was at."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.at = ""  # as the progress lines have it

    def __call__(self, line: str) -> None:
        """Print a line."""
        say(self._console, f"{self.at}: {line}" if self.at else line, "yellow")


class TrainingProgress:
    """Shows steps, loss, tokens/s, MB up and down, and the time that is left."""

    def __init__(self, console: Console, *, total_steps: int, done_steps: int) -> None:
        self._console = console
        self._total, self._first, self._done = total_steps, done_steps, done_steps
        self._started: float | None = None  # of the first step: an evaluation before it is no step's time
        self._tokens = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=done_steps, figures="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar."""
        say(self._console, line)

    def step(self, *, loss: float, tokens: int, wall_s: float, up_bytes: int, down_bytes: int) -> None:
        """Count one optimizer step; bytes are totals of this process, tokens and seconds are this step's."""
        now = time.perf_counter()
        self._started = now - wall_s if self._started is None else self._started
        self._done += 1
        self._tokens += tokens
        elapsed_s = max(now - self._started, 1e-9)
        figures = (
            f"loss {loss:.4f}  {self._tokens / elapsed_s:.0f} tokens/s  "
            f"{up_bytes / _MEGABYTE:.1f} MB up  {down_bytes / _MEGABYTE:.1f} MB down"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, figures=figures)
        elif self._is_due():
            left_s = elapsed_s / (self._done - self._first) * (self._total - self._done)
            self.say(f"step {self._done}/{self._total}  {figures}  {left_s:.0f} s left")

    def _is_due(self) -> bool:
        every = max(self._total // _PLAIN_LINES, 1)
        return self._done % every == 0 or self._done in (self._first + 1, self._total)
