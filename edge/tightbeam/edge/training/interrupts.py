"""Ctrl-C and SIGTERM during training: the first asks to stop after the step, the second stops at once.

Stopping between two steps is what makes the checkpoint exact: in the middle of one, random states have moved
and the weights may be half updated.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["StopRequest"]


class StopRequest:
    """Context in which a first stop signal sets `requested` instead of raising."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.requested = False
        self._on_first = on_first
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python takes signals in the main thread only; a run in another one is stopped by its caller.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._on_first()
