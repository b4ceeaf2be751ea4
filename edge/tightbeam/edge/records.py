"""Data files become chats: JSONL and CSV by their ending, their shape by the keys of the first record.

    messages                      [{"role": "user", "content": "..."}, ...]
    prompt, completion            a question and its answer
    instruction, [input,] output  the same, with an optional text that the instruction is about
    text                          plain text, learned whole

Everything that is wrong is a `DataError` that names file and line. No tokenizer here, and no torch.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from tightbeam.common.errors import DataError

__all__ = ["Message", "Record", "RecordFormat", "read_records"]

RecordFormat = Literal["messages", "prompt", "instruction", "text"]
Message = dict[str, str]

_NEEDS: dict[RecordFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_SHAPES = "messages; prompt, completion; instruction, [input,] output; or text"
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Record:
    """One example before tokenising: a chat, or plain text. `line` counts from 1."""

    line: int
    messages: tuple[Message, ...] = ()
    text: str = ""


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
    except OSError as error:
        raise DataError(
            f"Cannot read the data file {path}: {error.strerror}.",
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
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number} is not JSON: {error.msg} at column {error.colno}.",
                cure="Each line is one whole JSON object.",
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number} holds {type(row).__name__}, not a JSON object.",
                cure="Write one object per line, without a list around them.",
            )
        yield number, row


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}:{reader.line_num} has another number of columns than the header.",
                    cure="Put double quotes around a text that holds a comma or a line break.",
                )
            if isinstance(row.get("messages"), str):
                yield reader.line_num, {"messages": _json_cell(path, reader.line_num, row["messages"])}
            else:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num + 1} is not CSV: {error}.", cure="Check the quotes there."
        ) from error


def _json_cell(path: Path, line: int, cell: str) -> Any:
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line}: the column messages is not JSON: {error.msg}.",
            cure="Use a .jsonl file for chats.",
        ) from error


def _detect(path: Path, line: int, row: dict[str, Any]) -> RecordFormat:
    for found, keys in _NEEDS.items():
        if all(key in row for key in keys):
            return found
    raise DataError(
        f"{path}:{line} has keys {', '.join(map(str, row)) or 'none'}: no known shape.",
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
        return Record(line, messages=_messages(path, line, row["messages"]))
    texts = {
        key: _string(path, line, key, row[key])
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


def _string(path: Path, line: int, key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise DataError(
        f"{path}:{line}: {key} holds {type(value).__name__}, not text.", cure="Put it in double quotes."
    )


def _messages(path: Path, line: int, value: Any) -> tuple[Message, ...]:
    cure = 'Write "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
    if not isinstance(value, list) or not value:
        raise DataError(f"{path}:{line}: messages is not a list of messages.", cure=cure)
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{path}:{line}: message {number} lacks role or content.", cure=cure)
        role = message["role"]
        if role not in _ROLES:
            raise DataError(
                f"{path}:{line}: message {number} has the role {role!r}.",
                cure=f"Known roles: {', '.join(_ROLES)}.",
            )
        messages.append({"role": role, "content": _string(path, line, "content", message["content"])})
    return tuple(messages)
