r"""Chats and texts become token ids and labels; the loss is on the answers only.

The tokenizer's own chat template renders a chat, and `chats` finds the answers in it: these are learned,
everything else gets the label -100. Without a template a question and its answer are joined as
`{prompt}\n{completion}{eos}`.

Shapes: B examples of a batch, T tokens of the longest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tightbeam.common.errors import DataError
from tightbeam.edge.data.chats import ChatTemplate, Span, common_prefix
from tightbeam.edge.data.reading import Record, RecordFormat, read_records

__all__ = ["IGNORED", "Dataset", "Example", "collate", "load_dataset", "load_examples"]

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
    chats = ChatTemplate(tokenizer, path)
    examples, truncated, left_out = [], 0, []
    for record in records:
        ids, labels = _tokenise(record, found, chats, answer_only=answer_only)
        example = Example(tuple(ids[:max_length]), tuple(labels[:max_length]), record.line)
        truncated += len(ids) > max_length
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
    record: Record, found: RecordFormat, chats: ChatTemplate, *, answer_only: bool
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a record."""
    tokenizer, spans = chats.tokenizer, None
    special = found == "text" or not tokenizer.chat_template  # a template writes its own special tokens
    if found == "text":
        text = record.text
    elif special:
        if found == "messages":
            raise DataError(
                f"{chats.path}:{record.line} is a chat, and the tokenizer has no chat template.",
                cure="Use an instruct model, or records with prompt and completion.",
            )
        question, answer = (message["content"] for message in record.messages)
        text = f"{question}\n{answer}"
        spans = [(len(question) + 1, len(text))]
    elif answer_only:
        text, spans = chats.answers(record)
    else:
        text = chats.render(record)
    ids = _ids(tokenizer, text, special)
    if special and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)  # most tokenizers leave it to us, some do not
    if spans is None or not answer_only:
        return ids, ids
    return ids, _labels(tokenizer, text, spans, ids, special)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _labels(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], ids: list[int], special: bool
) -> list[int]:
    """The ids of what lies in the spans; a token across a border counts as after it."""
    labels = [IGNORED] * len(ids)
    for span in spans:
        first, last = (
            common_prefix(_ids(tokenizer, text[:border], special), ids) if border < len(text) else len(ids)
            for border in span
        )
        labels[first:last] = ids[first:last]
    return labels


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
