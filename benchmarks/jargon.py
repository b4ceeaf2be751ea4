"""The Jargon File as questions and answers: a task that a small model gets visibly better at.

Source: Debian's package `dict-jargon` 4.4.7 (public domain). Each dictionary entry becomes the prompt "What
does HEADWORD mean?" and, as completion, its definition with line breaks joined. Definitions shorter than 20
characters are left out; 2,266 remain. Shuffled with seed 0, the last 256 are for evaluation and the other
2,010 for training.

    apt-get download dict-jargon && dpkg -x dict-jargon_*.deb jargon
    python benchmarks/jargon.py jargon/usr/share/dictd FOLDER
"""

import gzip
import json
import random
import re
import sys
from pathlib import Path

NUM_EVAL = 256
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def read_entries(folder: Path) -> list[tuple[str, str]]:
    """Headword and definition of every entry of the dictd database (RFC 2229's server format) in `folder`."""
    text = gzip.decompress((folder / "jargon.dict.dz").read_bytes())
    places: dict[tuple[int, int], str] = {}  # several headwords may share an entry: the first counts
    for line in (folder / "jargon.index").read_text(encoding="utf-8", errors="replace").splitlines():
        headword, first, size = line.split("\t")[:3]
        if not headword.startswith("00-database"):
            places.setdefault((_number(first), _number(size)), headword)
    entries = []
    for (start, length), headword in sorted(places.items()):
        body = text[start : start + length].decode("utf-8", errors="replace")
        definition = re.sub(r"\s+", " ", body.partition("\n")[2]).strip()
        if len(definition) >= 20:
            entries.append((headword, definition))
    return entries


def split(entries: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Train and eval, shuffled with seed 0."""
    shuffled = list(entries)
    random.Random(0).shuffle(shuffled)
    return shuffled[:-NUM_EVAL], shuffled[-NUM_EVAL:]


def to_record(headword: str, definition: str) -> dict[str, str]:
    """One JSONL record."""
    return {"prompt": f"What does {headword} mean?\n", "completion": definition}


def _number(text: str) -> int:
    value = 0
    for digit in text:
        value = 64 * value + _DIGITS.index(digit)
    return value


def main() -> None:
    """Write train.jsonl and eval.jsonl."""
    source, target = map(Path, sys.argv[1:3])
    target.mkdir(parents=True, exist_ok=True)
    entries = read_entries(source)
    for name, part in zip(("train", "eval"), split(entries), strict=True):
        lines = [json.dumps(to_record(*entry), ensure_ascii=False) for entry in part]
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} of {len(entries)} entries")


if __name__ == "__main__":
    main()
