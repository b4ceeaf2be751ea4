"""The examples of every client as files: `clients/<name>/train.jsonl` and `eval.jsonl`.

Dealing is a function of the scenario: any process can make the files of any client and gets the same bytes.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tightbeam.common.errors import DataError
from tightbeam.common.files import atomic_write, cache_folder
from tightbeam.edge.data.reading import read_records
from tightbeam.federation.scenario import Scenario
from tightbeam.simulations.demo_inputs import CORPUS, chats_from_corpus, fetch
from tightbeam.simulations.partition import deal

__all__ = ["DEMO_TOPICS", "client_files", "deal_rows", "demo_rows", "read_rows"]

DEMO_TOPICS = (
    "ai", "botprofile", "coding", "computers", "conversations", "emotion", "food", "gossip", "greetings",
    "health", "history", "humor", "literature", "money", "movies", "politics", "psychology", "science",
    "sports", "tech_support", "trivia",
)  # fmt: skip
Row = Mapping[str, Any]


def client_files(scenario: Scenario, folder: Path, name: str) -> tuple[Path, Path]:
    """Training and evaluation file of one client; all are written when they are not there yet.

    Raises:
        DataError: the data cannot be read, or cannot be dealt out as the scenario asks.

    """
    here, dealt = folder / "clients", folder / "clients" / "dealt.sha256"
    if not dealt.is_file() or dealt.read_text(encoding="ascii") != _digest(scenario):
        for profile, parts in zip(scenario.profiles(), deal_rows(scenario), strict=True):
            for kind, rows in zip(("train", "eval"), parts, strict=True):
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                atomic_write(here / profile.name / f"{kind}.jsonl", text)
        atomic_write(dealt, _digest(scenario))  # last: with it, all are there
    return here / name / "train.jsonl", here / name / "eval.jsonl"


def _digest(scenario: Scenario) -> str:
    """Of what the files follow from, the data themselves left out."""
    parts = scenario.data.model_dump_json(), scenario.partition.model_dump_json(), scenario.clients
    return hashlib.sha256(repr((parts, scenario.seed)).encode()).hexdigest()


def deal_rows(scenario: Scenario) -> list[tuple[list[Row], list[Row]]]:
    """Rows of each client, those to learn and those held out."""
    rows, partition = _chosen(scenario), scenario.partition
    by_label = partition.by in ("field", "dirichlet")
    labels = [_label(row, partition.field) for row in rows] if by_label else [""] * len(rows)
    parts = deal(
        partition.by,
        labels,
        scenario.clients,
        alpha=partition.alpha,
        skew=partition.skew,
        min_examples=partition.min_examples,
        seed=scenario.seed,
    )
    return [_hold_out([rows[n] for n in part], scenario, number) for number, part in enumerate(parts)]


def _chosen(scenario: Scenario) -> Sequence[Row]:
    rows = read_rows(scenario.data.source, scenario.data.format)
    most = scenario.data.max_examples
    if most is None or most >= len(rows):
        return rows
    drawn = random.Random(f"{scenario.seed}/rows").sample(range(len(rows)), most)  # noqa: S311  no secret
    return [rows[number] for number in sorted(drawn)]


def _hold_out(rows: list[Row], scenario: Scenario, number: int) -> tuple[list[Row], list[Row]]:
    order = list(range(len(rows)))
    random.Random(f"{scenario.seed}/held-out/{number}").shuffle(order)  # noqa: S311  no secret
    held = min(max(round(len(rows) * scenario.data.eval_fraction), 1), len(rows) - 1)
    test = set(order[:held])
    learn = [row for place, row in enumerate(rows) if place not in test]
    return learn, [rows[place] for place in sorted(test)]


def _label(row: Row, field: str) -> str:
    if field not in row:
        raise DataError(
            f"A row has no key {field!r} to go by; its keys are {', '.join(row)}.",
            cure="Set partition.field to one of them, or partition.by to iid.",
        )
    return str(row[field])


@lru_cache(maxsize=4)
def read_rows(source: str, record_format: str) -> Sequence[Row]:
    """All rows of a file, or the demo's chats: records that an edge can read, with their other keys."""
    if source == "demo":
        return demo_rows()
    path = Path(source)
    records = read_records(path, record_format)[1]
    if path.suffix.lower() == ".csv":
        import csv

        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, strict=True))
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [json.loads(lines[record.line - 1]) for record in records]


def demo_rows() -> Sequence[Row]:
    """Chats of the demo's corpus with their topic; a question that several topics have goes to the first."""
    wheel, seen = fetch(CORPUS, cache_folder()), set[str]()
    rows: list[Row] = []
    for topic in DEMO_TOPICS:
        for chat in chats_from_corpus(wheel, (topic,)):
            if chat.question.casefold() not in seen:
                seen.add(chat.question.casefold())
                rows.append(json.loads(chat.to_json()) | {"topic": topic})
    return rows
