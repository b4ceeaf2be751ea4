"""A dictionary as questions and answers: a task that a small model gets visibly better at.

Sources, both in the public domain: the Jargon File 4.4.7 (Debian's `dict-jargon`, 2,307 entries) and The
Devil's Dictionary (`dict-devil`, 1,006). Each entry asks "What does HEADWORD mean?"; the answer is its
definition. Shuffled with seed 0, 2,048 entries (or all but 256 of a smaller book) are for training and the
next 256 for evaluation.

    apt-get download dict-jargon && dpkg -x dict-jargon_*.deb jargon
    python benchmarks/jargon.py jargon/usr/share/dictd FOLDER [chat]

`chat` writes conversations with the definition as it stands in the book, line breaks and indentation
included. Without it a record is a prompt and a completion with line breaks joined, and definitions shorter
than 20 characters are left out: of the Jargon File 2,266 entries, 2,010 for training and 256 for evaluation.
"""

import gzip
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NUM_TRAIN, NUM_EVAL, MIN_CHARACTERS = 2048, 256, 20
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

Entry = tuple[str, str]  # headword, definition as in the book


def read_entries(folder: Path) -> list[Entry]:
    """Every entry of the dictd database (RFC 2229's server format) in `folder`, in the order of the book."""
    index = next(folder.glob("*.index"))
    text = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    places: dict[tuple[int, int], str] = {}  # several headwords may share an entry: the first counts
    for line in index.read_text(encoding="utf-8", errors="replace").splitlines():
        headword, first, size = line.split("\t")[:3]
        if not headword.startswith("00-database"):
            places.setdefault((_number(first), _number(size)), headword)
    return [
        (headword, _definition(headword, text[start : start + length].decode("utf-8", errors="replace")))
        for (start, length), headword in sorted(places.items())
    ]


def chat_record(headword: str, definition: str) -> dict[str, Any]:
    """One JSONL record: a conversation."""
    asked = {"role": "user", "content": f"What does {headword} mean?"}
    return {"messages": [asked, {"role": "assistant", "content": definition}]}


def plain_record(headword: str, definition: str) -> dict[str, Any]:
    """One JSONL record: a prompt and its completion."""
    return {"prompt": f"What does {headword} mean?\n", "completion": joined(definition)}


def joined(definition: str) -> str:
    """The definition on one line."""
    return re.sub(r"\s+", " ", definition).strip()


def split(entries: Sequence[Entry], chat: bool) -> dict[str, list[Entry]]:
    """Training and evaluation data, disjoint."""
    shuffled = [entry for entry in entries if chat or len(joined(entry[1])) >= MIN_CHARACTERS]
    random.Random(0).shuffle(shuffled)
    cut = min(NUM_TRAIN, len(shuffled) - NUM_EVAL) if chat else len(shuffled) - NUM_EVAL
    return {"train": shuffled[:cut], "eval": shuffled[cut : cut + NUM_EVAL]}


def _definition(headword: str, entry: str) -> str:
    """What follows the headword, which has a line of its own or opens the text."""
    first, _, rest = entry.partition("\n")
    opening = first[: len(headword)]
    if opening.casefold() == headword.casefold() and first[len(headword) : len(headword) + 1] == ",":
        rest = entry[len(headword) + 1 :].lstrip()
    return rest.strip("\n").rstrip()


def _number(text: str) -> int:
    value = 0
    for digit in text:
        value = 64 * value + _DIGITS.index(digit)
    return value


def main() -> None:
    """Write train.jsonl and eval.jsonl."""
    source, target = map(Path, sys.argv[1:3])
    chat = "chat" in sys.argv[3:]
    to_record: Callable[[str, str], dict[str, Any]] = chat_record if chat else plain_record
    target.mkdir(parents=True, exist_ok=True)
    for name, entries in split(read_entries(source), chat).items():
        lines = [json.dumps(to_record(*entry), ensure_ascii=False) for entry in entries]
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)}")


if __name__ == "__main__":
    main()
