"""Data files become chats: JSONL and CSV by their ending, their shape by the keys of the first record.

    messages, [tools]             [{"role": "user", "content": "..."}, ...], and tools offered to the model
    prompt, completion            a question and its answer
    instruction, [input,] output  the same, with an optional text that the instruction is about
    text                          plain text, learned whole

Everything that is wrong is a `DataError` that names file and line. No tokenizer here, and no torch.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from tightbeam.common.errors import DataError, reason

__all__ = ["SILENT_KEYS", "Message", "Record", "RecordFormat", "one_line", "read_records"]

RecordFormat = Literal["messages", "prompt", "instruction", "text"]
Message = dict[str, Any]  # role and content are text; other keys are as the file has them

_NEEDS: dict[RecordFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_SHAPES = "messages; prompt, completion; instruction, [input,] output; or text"
_ROLES = ("system", "user", "assistant", "tool")
SILENT_KEYS = {"role", "id", "name", "tool_call_id"}  # of a message: they say nothing


@dataclass(frozen=True, slots=True)
class Record:
    """One example before tokenising: a chat, or plain text. `line` counts from 1."""

    line: int
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: list[Any] | None = None  # JSON schemas


def read_records(path: str | Path, record_format: str = "auto") -> tuple[RecordFormat, list[Record]]:
    """Read every record of a file; also tell the format, which all records must share.

    Raises:
        DataError: missing, empty, undecodable or malformed file, with the line.

    """
    path = Path(path)
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} holds no record.", cure=f"Give it one record per line, with keys {_SHAPES}.")
    found = _detect(path, *rows[0]) if record_format == "auto" else cast(RecordFormat, record_format)
    return found, [_record(path, line, row, found) for line, row in rows]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without ending'}.", cure="Use .jsonl or .csv."
        )
    return reader(path, _text(path))


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(
            f"Cannot read the data file {path}: {reason(error)}.",
            cure="A relative path starts at the folder the command runs in.",
        ) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line} is not UTF-8 text.", cure="Save the file as UTF-8.") from error


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold U+2028, which that takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _json(f"{path}:{number}", line, "Each line is one whole JSON object.")
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number} holds {type(row).__name__}, not a JSON object.",
                cure="Write one object per line, without a list around them.",
            )
        yield number, row


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # of the whole process, and 131,072 characters unless told otherwise
    spaced = bool(re.search(r", +\S", text.partition("\n")[0]))  # a header written as prose has its commas
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=spaced)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}:{reader.line_num} has another number of columns than the header.",
                    cure="Put double quotes around a text that holds a comma or a line break.",
                )
            if isinstance(row.get("messages"), str):
                place, cure = f"{path}:{reader.line_num}: the column messages", "Use a .jsonl file for chats."
                yield reader.line_num, {"messages": _json(place, row["messages"], cure)}
            else:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num + 1} is not CSV: {error}.", cure="Check the quotes there."
        ) from error


def _json(place: str, text: str, cure: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error.msg} at column {error.colno}.", cure=cure) from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{place} holds {half}, half of a character.",
            cure="Take it out: a text that was cut within an emoji has it, and no tokenizer can read it.",
        ) from error
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply.", cure=cure) from error
    except ValueError as error:
        raise DataError(f"{place} holds a number of too many digits.", cure="Write it as text.") from error
    return value


def one_line(text: str) -> str:
    """Text from a file as a message can quote it."""
    return f"{text if text.isprintable() else repr(text):.200}"


def _detect(path: Path, line: int, row: dict[str, Any]) -> RecordFormat:
    for found, keys in _NEEDS.items():
        if all(key in row for key in keys):
            return found
    raise DataError(
        f"{path}:{line} has keys {', '.join(map(one_line, row)) or 'none'}: no known shape.",
        cure=f"Use the keys {_SHAPES}.",
    )


def _record(path: Path, line: int, row: dict[str, Any], found: RecordFormat) -> Record:
    missing = [key for key in _NEEDS[found] if key not in row]
    if missing:
        raise DataError(
            f"{path}:{line} lacks {', '.join(missing)}.",
            cure=f"All records of a file share one shape; this one is read as {found}.",
        )
    if found == "messages":
        messages = _messages(path, line, row["messages"])
        return Record(line, messages=messages, tools=_tools(path, line, row.get("tools")))
    texts = {
        key: _string(f"{path}:{line}", key, row[key])
        for key in (*_NEEDS[found], "input")
        if row.get(key) is not None
    }
    _refuse_none(path, line, found, texts)
    if found == "text":
        return Record(line, text=texts["text"])
    if found == "prompt":
        return Record(line, messages=_pair(texts["prompt"], texts["completion"]))
    about = f"\n\n{texts['input']}" if texts.get("input") else ""
    return Record(line, messages=_pair(texts["instruction"] + about, texts["output"]))


def _refuse_none(path: Path, line: int, found: RecordFormat, texts: dict[str, str]) -> None:
    learned = _NEEDS[found][-1]
    for key in _NEEDS[found]:
        if key not in texts or (key == learned and not texts[key].strip()):
            raise DataError(f"{path}:{line}: {key} is empty.", cure="Fill it or take the record out.")


def _pair(question: str, answer: str) -> tuple[Message, ...]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _string(place: str, key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise DataError(
        f"{place}: {key} holds {type(value).__name__}, not text.", cure="Write it as text, in double quotes."
    )


def _tools(path: Path, line: int, value: Any) -> list[Any] | None:
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise DataError(
            f"{path}:{line}: tools is not a list of objects.", cure="Give each tool its JSON schema."
        )
    return value or None


def _messages(path: Path, line: int, value: Any) -> tuple[Message, ...]:
    cure = 'Write "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
    if not isinstance(value, list) or not value:
        raise DataError(f"{path}:{line}: messages is not a list of messages.", cure=cure)
    messages = []
    for number, message in enumerate(value, start=1):
        place = f"{path}:{line}: message {number}"
        if not isinstance(message, dict) or "role" not in message or not message.keys() - SILENT_KEYS:
            raise DataError(f"{place} lacks role or content.", cure=cure)
        messages.append(_message(place, message))
    return tuple(messages)


def _message(place: str, message: dict[str, Any]) -> Message:
    """A message with its content as text, and without keys that hold nothing."""
    role, content = message["role"], _content(place, message.get("content"))
    if role not in _ROLES:
        raise DataError(f"{place} has the role {role!r:.40}.", cure=f"Known roles: {', '.join(_ROLES)}.")
    others = {key: value for key, value in message.items() if value not in (None, "", [], {})}
    wanted = role == "assistant" or message.get("content") is None  # a system prompt may be empty
    if wanted and not content.strip() and not others.keys() - SILENT_KEYS - {"content"}:
        raise DataError(f"{place} is empty.", cure="Fill it, or take the chat out.")
    return {**others, "role": role, "content": content}


def _content(place: str, value: Any) -> str:
    """Text, or its parts joined as OpenAI's API has them."""
    if not isinstance(value, list):
        return "" if value is None else _string(place, "content", value)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(
                f"{place} has a part of type {kind!r:.40}; only text can be learned.",
                cure='Write its content as text, or as parts {"type": "text", "text": "..."}.',
            )
    return "".join(part["text"] for part in value)
