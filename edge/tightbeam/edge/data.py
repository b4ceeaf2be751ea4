r"""Chats become token ids and labels; the loss is on the answers only, and the mask can be looked at.

The tokenizer's own chat template renders a chat. Which tokens are answer follows from rendering the chat up
to each assistant message: what the text has from there to the message's end is learned, everything else gets
the label -100. A template that rewrites earlier messages, so that the shorter text is no prefix of the longer
one, is refused instead of masked wrongly. Without a template a question and its answer are joined as
`{prompt}\n{completion}{eos}`.

Shapes: B examples of a batch, T tokens of the longest one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tightbeam.common.errors import DataError
from tightbeam.edge.records import Message, Record, RecordFormat, read_records

__all__ = [
    "IGNORED",
    "DataCheck",
    "Dataset",
    "Example",
    "check_file",
    "collate",
    "epoch_order",
    "load_dataset",
    "load_examples",
    "split_examples",
]

IGNORED = -100  # the label that the loss of every transformers model skips


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example; `labels` has a -100 for every token that is not learned."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    line: int = 0  # where it stands in its file, from 1

    @property
    def num_learned(self) -> int:
        """Tokens with a loss. The first token has none: nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Dataset:
    """A tokenised file, and what had to be cut or left out of it."""

    path: Path
    record_format: RecordFormat
    examples: list[Example]
    num_truncated: int  # examples longer than max_length, cut at their end
    left_out_lines: list[int]  # lines whose whole answer fell to that cut

    def warnings(self) -> list[str]:
        """Sentences a user should read before training; empty when nothing was lost."""
        found = []
        if self.num_truncated:
            found.append(
                f"{self.path}: {self.num_truncated} examples are longer than max_length and were cut."
            )
        if self.left_out_lines:
            found.append(
                f"{self.path}: {len(self.left_out_lines)} examples have no answer within max_length and were "
                f"left out, the first at line {self.left_out_lines[0]}. Raise data.max_length."
            )
        return found


def load_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    record_format: str = "auto",
    max_length: int = 1024,
    answer_only: bool = True,
) -> Dataset:
    """Read and tokenise a file.

    Raises:
        DataError: see `read_records`; also when no example keeps a token to learn, or a chat meets a
            tokenizer without a chat template.

    """
    path = Path(path)
    found, records = read_records(path, record_format)
    examples, truncated, left_out = [], 0, []
    for record in records:
        whole = _tokenise(path, record, found, tokenizer, answer_only)
        example = Example(whole.input_ids[:max_length], whole.labels[:max_length], whole.line)
        truncated += len(whole.input_ids) > max_length
        if example.num_learned:
            examples.append(example)
        else:
            left_out.append(record.line)
    if not examples:
        raise DataError(
            f"{path}: none of {len(records)} examples has a token to learn within {max_length} tokens.",
            cure="Raise data.max_length, or look at the mask with `tightbeam data check`.",
        )
    return Dataset(path, found, examples, truncated, left_out)


def load_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    record_format: str = "auto",
    max_length: int = 1024,
    answer_only: bool = True,
) -> list[Example]:
    """`load_dataset` for callers who want the examples only."""
    return load_dataset(
        path, tokenizer, record_format=record_format, max_length=max_length, answer_only=answer_only
    ).examples


def _tokenise(
    path: Path, record: Record, found: RecordFormat, tokenizer: PreTrainedTokenizerBase, answer_only: bool
) -> Example:
    if found == "text":
        text, spans, special = record.text + (tokenizer.eos_token or ""), None, True
    elif tokenizer.chat_template and not answer_only:
        text, spans, special = _template(tokenizer, list(record.messages), False), None, False
    elif tokenizer.chat_template:
        text, spans = _render(path, record, tokenizer)
        special = False  # a template writes its own special tokens
    elif found == "messages":
        raise DataError(
            f"{path}:{record.line} is a chat, and the tokenizer has no chat template.",
            cure="Use an instruct model, or records with prompt and completion.",
        )
    else:
        text, spans = _join(record.messages, tokenizer.eos_token or "")
        special = True
    ids = _ids(tokenizer, text, special)
    if spans is None or not answer_only:
        return Example(tuple(ids), tuple(ids), record.line)
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        first, last = (_tokens_before(tokenizer, text, border, ids, special) for border in (start, end))
        labels[first:last] = ids[first:last]
    return Example(tuple(ids), tuple(labels), record.line)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _join(messages: tuple[Message, ...], eos: str) -> tuple[str, list[tuple[int, int]]]:
    question, answer = (message["content"] for message in messages)
    text = f"{question}\n{answer}{eos}"
    return text, [(len(question) + 1, len(text))]


def _render(
    path: Path, record: Record, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Text of the chat, and from which to which character each answer goes."""
    messages = list(record.messages)
    text = _template(tokenizer, messages, False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:number], True) if number else ""
        through = _template(tokenizer, messages[: number + 1], False)
        end = _common_prefix(through, text)
        if not text.startswith(before) or end <= len(before):
            raise DataError(
                f"{path}:{record.line}: the chat template rewrites earlier messages, so the answer in "
                f"message {number + 1} cannot be told from the rest.",
                cure="Give each answer its own record, or set data.answer_only=false.",
            )
        spans.append((len(before), end))
    return text, spans


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], ask: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))


def _tokens_before(
    tokenizer: PreTrainedTokenizerBase, text: str, border: int, ids: list[int], special: bool
) -> int:
    """Count the tokens before a character; one that lies across the border counts as after it."""
    if border >= len(text):
        return len(ids)
    return _common_prefix(_ids(tokenizer, text[:border], special), ids)


def _common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    differ = (i for i, (one, other) in enumerate(zip(left, right, strict=False)) if one != other)
    return next(differ, min(len(left), len(right)))


def collate(
    examples: Sequence[Example], pad_id: int, padding_side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each int64 [B, T].

    Raises:
        DataError: no example has a token to learn; the loss of such a batch is NaN.

    """
    if not any(example.num_learned for example in examples):
        lines = ", ".join(str(example.line) for example in examples)
        raise DataError(
            f"A batch has no token to learn; its samples are from lines {lines}.",
            cure="Look at the label mask with `tightbeam data check`, or raise data.max_length.",
        )
    width = max(len(example.input_ids) for example in examples)

    def pad(row: Sequence[int], filler: int) -> list[int]:
        fill = [filler] * (width - len(row))
        return [*fill, *row] if padding_side == "left" else [*row, *fill]

    return {
        "input_ids": torch.tensor([pad(example.input_ids, pad_id) for example in examples]),
        "attention_mask": torch.tensor([pad([1] * len(example.input_ids), 0) for example in examples]),
        "labels": torch.tensor([pad(example.labels, IGNORED) for example in examples]),
    }


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """Order of the examples in one epoch: the same on every machine, another one every epoch."""
    order = list(range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311  an order, not a secret
    return order


def split_examples(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out a share of the examples; at least one goes to either side.

    Raises:
        DataError: fewer than two examples.

    """
    if len(examples) < 2:
        raise DataError(
            "One example cannot be split into training and evaluation.", cure="Set data.eval_fraction=0."
        )
    order = epoch_order(len(examples), seed, -1)
    held = min(max(round(len(examples) * fraction), 1), len(examples) - 1)
    held_out = set(order[:held])
    return (
        [example for i, example in enumerate(examples) if i not in held_out],
        [examples[i] for i in sorted(held_out)],
    )


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What `tightbeam data check` shows of a file."""

    dataset: Dataset
    token_lengths: list[int]  # per example, ascending
    num_learned_tokens: int
    samples: list[list[tuple[str, bool]]]  # runs of text of the first examples, and whether they are learned

    def render(self) -> str:
        """Plain text; what is learned stands in `[[ ]]`."""
        lengths, data = self.token_lengths, self.dataset
        shortest, median, longest = lengths[0], lengths[len(lengths) // 2], lengths[-1]
        share = self.num_learned_tokens / sum(lengths)
        lines = [
            f"{data.path}: {len(lengths)} examples, read as {data.record_format}",
            f"tokens per example: shortest {shortest}, median {median}, longest {longest}",
            f"tokens in all: {sum(lengths)}, of which {self.num_learned_tokens} are learned ({share:.0%})",
            *data.warnings(),
        ]
        for example, sample in zip(data.examples, self.samples, strict=False):
            text = "".join(f"[[{run}]]" if learned else run for run, learned in sample)
            lines += ["", f"line {example.line}, learned text in [[ ]]:", text]
        return "\n".join(lines)


def check_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    n: int = 2,
    *,
    record_format: str = "auto",
    max_length: int = 1024,
    answer_only: bool = True,
) -> DataCheck:
    """Tokenise a file as training would and show its first `n` examples with their label mask."""
    dataset = load_dataset(
        path, tokenizer, record_format=record_format, max_length=max_length, answer_only=answer_only
    )
    return DataCheck(
        dataset=dataset,
        token_lengths=sorted(len(example.input_ids) for example in dataset.examples),
        num_learned_tokens=sum(example.num_learned for example in dataset.examples),
        samples=[_runs(example, tokenizer) for example in dataset.examples[:n]],
    )


def _runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        learned = label != IGNORED
        if not runs or runs[-1][1] != learned:
            runs.append(([], learned))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(tokens)), learned) for tokens, learned in runs]
