"""A tokenizer's chat template renders a chat, and here is found which characters of it are the answers.

A template with `{% generation %}` says so itself. Else an answer begins where the messages before it and the
prompt for an answer end, and ends where the chat up to it ends. Templates that show a message otherwise once
others follow (reasoning models show the thoughts of the last answer only) have no such borders: there, a mark
is put into the message, and where it comes out tells the place. What cannot be told is refused, and so is
what the template would leave out.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tightbeam.common.errors import DataError
from tightbeam.edge.data.reading import SILENT_KEYS, Message, Record, one_line
from tightbeam.edge.data.rendering import Overrun, TemplateFault, render

__all__ = ["ChatTemplate", "Span", "common_prefix"]

Span = tuple[int, int]  # first character, and the one after the last

_MARK = "\ue000"  # of Unicode's private use: no text means anything by it


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of a tokenizer, for the chats of one file."""

    tokenizer: PreTrainedTokenizerBase
    path: Path
    _shown: set[tuple[str, str]] = field(default_factory=set)  # role and key that it is known to show

    def render(self, record: Record) -> str:
        """The text of a chat.

        Raises:
            DataError: the template refuses the chat, or leaves something of it out.

        """
        return self._fitted(record)[1]

    def answers(self, record: Record) -> tuple[str, list[Span]]:
        """The text of a chat, and what of it are answers.

        Raises:
            DataError: see `render`; also when the borders of an answer cannot be told.

        """
        answers = [n for n, message in enumerate(record.messages) if message["role"] == "assistant"]
        if not answers:
            raise self._refusal(
                record, "no message has the role assistant, so there is nothing to learn",
                "Add the answer, take the chat out, or set data.answer_only=false.",
            )  # fmt: skip
        record, text = self._fitted(record)
        spans = self._own_spans(record, text) or [self._span(record, number, text) for number in answers]
        if any(start >= end for start, end in spans):
            raise self._unclear(record, answers[0])
        return text, spans

    def _fitted(self, record: Record) -> tuple[Record, str]:
        """A chat with arguments of calls as the template takes them, and its text."""
        fault: TemplateFault | None = None
        for as_text in (False, True):  # most templates write objects out themselves, some want text
            messages = tuple(_with_arguments(message, as_text) for message in record.messages)
            try:
                text, _ = self._rendered(record, messages)
            except TemplateFault as error:
                fault = fault or error
                continue
            record = replace(record, messages=messages)
            self._refuse_lost(record, text)
            return record, text
        why = one_line(" ".join(str(fault).split()))
        raise self._refusal(
            record,
            f"the chat template refuses this chat ({why})",
            "Write it as the model's template wants it; some take no system message, or no two of a role "
            "in a row.",
        ) from fault

    def _own_spans(self, record: Record, text: str) -> list[Span]:
        """What the template itself marks as generated; nothing where that does not hold the answers."""
        if not re.search(r"\{%-?\s*generation\b", self.tokenizer.get_chat_template(tools=record.tools)):
            return []
        rendered, spans = self._rendered(record, record.messages, marks=True)
        marked = "".join(text[start:end] for start, end in spans)
        answers = (m["content"].strip() for m in record.messages if m["role"] == "assistant")
        sound = rendered == text and all(answer in marked for answer in answers)
        return [(start, end) for start, end in spans if start < end] if sound else []

    def _span(self, record: Record, number: int, text: str) -> Span:
        """From the end of the prompt for answer `number` to the end of its message."""
        messages = record.messages
        is_last = number == len(messages) - 1
        before = self._try(record, messages[:number], ask=True) if number else None
        through = text if is_last else self._try(record, messages[: number + 1])
        begun = before is not None and text.startswith(before)
        if begun and through is not None and through.startswith(str(before)) and text.startswith(through):
            return len(str(before)), len(through)
        start = len(str(before)) if begun else self._start(record, number, text)
        end: int | None = len(text)
        if not is_last:
            end = self._place(record, number, messages, text, at_end=True)
            alone = self._place(record, number, messages[: number + 1], through, at_end=True)
            if end is not None and alone is not None and through is not None:
                end += common_prefix(text[end:], through[alone:])
            else:
                end = None
        if start is None or end is None:
            raise self._unclear(record, number)
        return start, end

    def _start(self, record: Record, number: int, text: str) -> int | None:
        """Where a message begins that is not shown behind the prompt for it: with content or thoughts."""
        messages, message = record.messages, record.messages[number]
        start = self._place(record, number, messages, text, at_end=False)
        floor = self._place(record, number - 1, messages, text, at_end=True) if number else 0
        bare = {"role": message["role"], "content": _MARK + message["content"]}
        without = self._try(record, [*messages[:number], bare, *messages[number + 1 :]])
        if start is None or floor is None or without is None:
            return start
        first = common_prefix(text, without)
        return min(start, first) if first >= floor else start

    def _place(
        self, record: Record, number: int, messages: Sequence[Message], text: str | None, *, at_end: bool
    ) -> int | None:
        """Where in `text`, the rendering of `messages`, the content of one of them begins or ends."""
        marked = self._marked(record, number, messages, at_end=at_end)
        if text is None or marked is None or marked.count(_MARK) != 1:
            return None
        head, tail = marked.split(_MARK)
        # The mark may move white space beside it, which templates trim; nothing else may have changed.
        for rest in (tail.lstrip(),) if at_end else (tail, tail.lstrip()):
            place = len(text) - len(rest)
            if text.endswith(rest) and "".join(text[:place].split()) == "".join(head.split()):
                return place
        return None

    def _marked(
        self, record: Record, number: int, messages: Sequence[Message], *, at_end: bool = True
    ) -> str | None:
        content = messages[number]["content"]
        marked = {**messages[number], "content": content + _MARK if at_end else _MARK + content}
        return self._try(record, [*messages[:number], marked, *messages[number + 1 :]])

    def _refuse_lost(self, record: Record, text: str) -> None:
        messages = record.messages
        for number, message in enumerate(messages):
            content = message["content"].strip()
            if content not in text and _MARK not in (self._marked(record, number, messages) or ""):
                raise self._lost(record, f"message {number + 1}, of the role {message['role']},")
            for key in message.keys() - SILENT_KEYS - {"content"}:
                if (message["role"], key) not in self._shown:
                    if not self._shows(record, number, key, text):
                        raise self._lost(record, f"the key {key!r:.40} of message {number + 1}")
                    self._shown.add((message["role"], key))
        if record.tools and self._try(replace(record, tools=None), messages) == text:
            raise self._lost(record, "the key 'tools'")

    def _shows(self, record: Record, number: int, key: str, text: str) -> bool:
        """Whether a key of a message changes the text; some are shown in the last message only."""
        messages = record.messages
        without = {name: value for name, value in messages[number].items() if name != key}
        before = messages[:number]
        if self._try(record, [*before, without, *messages[number + 1 :]]) != text:
            return True
        return self._try(record, [*before, without]) != self._try(record, [*before, messages[number]])

    def _rendered(
        self, record: Record, messages: Sequence[Message], *, ask: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        tokenizer = self.tokenizer
        template = tokenizer.get_chat_template(tools=record.tools)
        try:
            return render(
                template, messages, record.tools, tokenizer.special_tokens_map, ask=ask, marks=marks
            )
        except Overrun as error:
            raise self._refusal(
                record,
                f"to render this chat the chat template takes {error}",
                "If the record is of a usual size, the template is broken or hostile: do not use this model.",
            ) from error

    def _try(self, record: Record, messages: Sequence[Message], ask: bool = False) -> str | None:
        """The text of part of a chat; None when the template wants more of it."""
        try:
            return self._rendered(record, messages, ask=ask)[0]
        except TemplateFault:
            return None

    def _refusal(self, record: Record, problem: str, cure: str) -> DataError:
        return DataError(f"{self.path}:{record.line}: {problem}.", cure=cure)

    def _lost(self, record: Record, what: str) -> DataError:
        return self._refusal(
            record,
            f"the chat template does not show {what} so it would be lost",
            "Take it out, or use a model whose template shows it.",
        )

    def _unclear(self, record: Record, number: int) -> DataError:
        return self._refusal(
            record,
            f"the chat template rewrites message {number + 1}, so the borders of its answer cannot be told",
            "Give each answer its own record, or set data.answer_only=false.",
        )


def _with_arguments(message: Message, as_text: bool) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call(call, as_text) for call in calls]}


def _call(call: Any, as_text: bool) -> Any:
    """A call of a tool with its arguments as an object, or as JSON text, which OpenAI's API has."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if as_text and isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
    return {**call, "function": {**function, "arguments": arguments}}


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences have in common at their start."""
    differ = (i for i, (one, other) in enumerate(zip(left, right, strict=False)) if one != other)
    return next(differ, min(len(left), len(right)))
