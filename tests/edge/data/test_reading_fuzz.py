"""Whatever a data file holds, reading it gives examples or one `DataError` that names the place."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from support.edge_runs import byte_tokenizer
from tightbeam.common.errors import DataError
from tightbeam.edge.data import load_dataset

TOKENIZERS = [byte_tokenizer(), byte_tokenizer(None)]
KEYS = ["messages", "prompt", "completion", "instruction", "input", "output", "text", "tools", "id"]

# Every code point, halves of surrogate pairs among them, and what readers trip over.
texts = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    [
        "",
        " ",
        "\0",
        "\ufeff",
        "\u2028",
        "\r",
        "\n",
        "\r\n",
        '"',
        ",",
        "\ud83d",
        "\ue000",
        "</s>",
        "<|im_end|>",
    ]
)
numbers = st.integers() | st.floats() | st.sampled_from([10**4299, 1e308])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": texts | values})
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | values},
    optional={"content": texts | st.lists(parts, max_size=2) | values, "tool_calls": values, "x": values},
)
plain = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts})
records = st.one_of(
    values,
    st.dictionaries(st.sampled_from(KEYS), texts | values, max_size=4),
    st.fixed_dictionaries({"text": texts}),
    st.fixed_dictionaries({"prompt": texts, "completion": texts}),
    st.fixed_dictionaries({"messages": st.lists(messages, max_size=4)}, optional={"tools": values}),
    st.fixed_dictionaries({"messages": st.lists(plain, min_size=1, max_size=4)}),
)


def _read(folder: Path, name: str, raw: bytes, tokenizer: PreTrainedTokenizerBase) -> None:
    path = folder / name
    path.write_bytes(raw)
    for answer_only in (True, False):
        complaint = _complaint(path, tokenizer, answer_only)
        if complaint is not None:
            assert re.match(
                re.escape(str(path)) + r"(:[1-9]| holds no record| has no header|: none of)",
                complaint.message,
            )
            assert complaint.cure
            assert "\n" not in str(complaint)


def _complaint(path: Path, tokenizer: PreTrainedTokenizerBase, answer_only: bool) -> DataError | None:
    try:
        dataset = load_dataset(path, tokenizer, max_length=64, answer_only=answer_only)
    except DataError as error:
        return error
    assert all(found.num_learned and found.line for found in dataset.examples)
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=st.lists(records, min_size=1, max_size=3), newline=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
@example(rows=[{"text": "\ud83d"}], newline="\n")
@example(rows=[{"messages": [{"role": "user", "content": "\udc00"}]}], newline="\n")
def test_any_json_lines(folder: Path, rows: list[Any], newline: str) -> None:
    for ascii_only in (True, False):
        text = newline.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        for tokenizer in TOKENIZERS:
            _read(folder, "a.jsonl", text.encode("utf-8", "surrogatepass"), tokenizer)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    raw=st.binary() | texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
    start=st.sampled_from(KEYS),
)
@example(raw=b"[" * 50_000, start="text")
@example(raw=b"9" * 10_000, start="text")
@example(raw=b'"' + b"x" * 200_000, start="text")
def test_any_bytes(folder: Path, raw: bytes, start: str) -> None:
    for name, before in (
        ("a.jsonl", b""),
        ("a.jsonl", f'{{"{start}": '.encode()),
        ("a.csv", b""),
        ("a.csv", start.encode()),
        ("a.csv", f"\ufeff{start}\n".encode()),
    ):
        _read(folder, name, before + raw, TOKENIZERS[0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    cells=st.lists(st.lists(texts, max_size=3), min_size=1, max_size=4),
    ending=st.sampled_from(["\n", "\r", "\r\n"]),
)
def test_any_table(folder: Path, cells: list[list[str]], ending: str) -> None:
    lines = ["prompt,completion", *(",".join(f'"{cell}"' for cell in row) for row in cells)]
    _read(folder, "a.csv", ending.join(lines).encode("utf-8", "surrogatepass"), TOKENIZERS[0])
