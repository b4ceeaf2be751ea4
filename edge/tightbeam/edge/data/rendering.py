"""Chat templates are programs of whoever made the model, so they run in a process of their own.

There, a rendering has so much time, memory and text, and ends with the process where it takes more. The
process stays for the next chat. This file is also that process's program: run as a script it reads requests
from its input and answers each, one line of JSON either way.
"""

import atexit
import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, BinaryIO

import psutil
from jinja2 import TemplateError

from tightbeam.common.errors import TightbeamError

__all__ = ["Overrun", "TemplateFault", "render"]

MOST_SECONDS = 10.0  # of one rendering; those of published templates take milliseconds
MOST_BYTES = 512 << 20  # of memory, beside what the process has before
_START_SECONDS = 120.0
_LOOK_SECONDS = 0.01
_ENDED = "more memory, text or nesting than it may"
_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_TODAY = date(2024, 7, 26)  # for every template that asks: the same file gives the same tokens on every day


class TemplateFault(Exception):  # noqa: N818 - of a chat, not of this program
    """A template does not take a chat; the text says why, in the template's words."""


class Overrun(Exception):  # noqa: N818 - becomes a DataError with its line
    """A rendering takes more than it may; the text says more of what."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    special_tokens: Mapping[str, Any],
    *,
    ask: bool = False,
    marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat; with `marks` also what of it the template itself marks as generated.

    Raises:
        TemplateFault: the template refuses the chat.
        Overrun: see there.

    """
    present = [{k: v for k, v in message.items() if v is not None} for message in messages]
    request = [template, present, tools, dict(special_tokens), ask, marks]
    line = json.dumps(request, default=str).encode() + b"\n"
    global _worker
    with _ONE_CHAT:
        if _worker is None or _worker.owner != os.getpid():
            _worker = _Worker()
        try:
            text, spans, fault = _worker.answer(line)
        except BaseException:  # also an interrupt: the answer that is still to come belongs to no later chat
            _worker.end()
            _worker = None
            raise
    if fault is not None:
        raise TemplateFault(fault)
    return text, [(start, end) for start, end in spans]


class _Worker:
    """The process, seen from the one that asks."""

    def __init__(self) -> None:
        self.owner = os.getpid()  # a fork must not read the answers of its parent
        self._process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        atexit.register(self.end)
        self._memory = psutil.Process(self._process.pid)
        try:
            self._wait(_START_SECONDS, sys.maxsize)
            self._base_bytes = _taken(self._memory)
        except Overrun as error:
            self.end()
            raise TightbeamError(
                "The process that renders chat templates does not start.",
                cure=f"See what `{sys.executable} {__file__}` says.",
            ) from error
        except BaseException:
            self.end()
            raise

    def answer(self, request: bytes) -> list[Any]:
        try:
            self._input.write(request)
            self._input.flush()
        except OSError as error:
            raise Overrun(_ENDED) from error
        answer: list[Any] = json.loads(self._wait(MOST_SECONDS, self._base_bytes + MOST_BYTES))
        return answer

    def _wait(self, seconds: float, most_bytes: int) -> bytes:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                answer = self._answers.get(timeout=_LOOK_SECONDS)
                if not answer:
                    raise Overrun(_ENDED)
                return answer
            with contextlib.suppress(psutil.NoSuchProcess):
                if _taken(self._memory) > most_bytes:
                    raise Overrun(f"more than {MOST_BYTES >> 20} MB of memory")
        raise Overrun(f"more than {seconds:.0f} s")

    def _read(self) -> None:
        for answer in self._output:
            self._answers.put(answer)
        self._answers.put(b"")

    def end(self) -> None:
        atexit.unregister(self.end)
        if self.owner != os.getpid():
            return
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._output.close()
        with contextlib.suppress(OSError):
            self._input.close()


def _taken(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.vms if sys.platform == "win32" else memory.rss)  # there: what it committed


_ONE_CHAT = threading.Lock()
_worker: _Worker | None = None


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    import faulthandler

    from transformers.utils.chat_template_utils import render_jinja_template

    render_chats: Any = render_jinja_template  # annotated as if it gave the text alone
    _bound_memory()
    answers.write(b"ready\n")
    answers.flush()
    with open(os.devnull, "w") as nowhere:
        for line in requests:
            template, messages, tools, special_tokens, ask, marks = json.loads(line)
            faulthandler.dump_traceback_later(2 * MOST_SECONDS, exit=True, file=nowhere)  # if nobody waits
            answer: list[Any]
            try:
                texts, spans = render_chats(
                    [messages],
                    tools=tools,
                    chat_template=_NOW.sub(lambda call: repr(_TODAY.strftime(call[2])), template),
                    add_generation_prompt=ask,
                    return_assistant_tokens_mask=marks,
                    **special_tokens,
                )
                answer = [texts[0], spans[0] if marks else [], None]
            except _FAULTS as error:
                answer = ["", [], f"{str(error) or type(error).__name__:.1000}"]
            reply = json.dumps(answer).encode() + b"\n"
            if len(reply) > (1 << 20) + 16 * len(line):
                return
            answers.write(reply)
            answers.flush()
            faulthandler.cancel_dump_traceback_later()


def _bound_memory() -> None:
    """Let the system refuse what is too much, before it is taken; elsewhere the other process looks."""
    if sys.platform == "linux":
        import resource

        most = psutil.Process().memory_info().vms + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
