"""Data files: every shape that is read, every mistake with its line, and the mask on what is learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.edge_runs import CHATML, byte_tokenizer, write_jsonl
from tightbeam.common.errors import DataError
from tightbeam.edge.data import (
    IGNORED,
    Example,
    check_file,
    collate,
    epoch_order,
    load_dataset,
    load_examples,
    split_examples,
)
from tightbeam.edge.data.reading import read_records

PAIR = {"prompt": "Who?", "completion": "Me."}
CHAT = [
    {"role": "system", "content": "Short."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def _learned(example: Example, template: str | None = CHATML) -> str:
    kept = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    return str(byte_tokenizer(template).decode(kept))


def _text(example: Example, template: str | None = CHATML) -> str:
    return str(byte_tokenizer(template).decode(list(example.input_ids)))


def _one(tmp_path: Path, row: dict[str, Any], template: str | None = CHATML, **options: Any) -> Example:
    path = write_jsonl(tmp_path / "one.jsonl", [row])
    (example,) = load_examples(path, byte_tokenizer(template), **options)
    return example


def test_a_pair_goes_through_the_chat_template_and_the_answer_is_learned(tmp_path: Path) -> None:
    example = _one(tmp_path, PAIR)
    assert _text(example) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
    assert _learned(example) == "Me.<|im_end|>\n"


def test_every_answer_of_a_chat_is_learned_and_nothing_else(tmp_path: Path) -> None:
    assert _learned(_one(tmp_path, {"messages": CHAT})) == "Me.<|im_end|>\nYes.<|im_end|>\n"


def test_without_a_template_a_pair_is_joined_by_a_line_break(tmp_path: Path) -> None:
    example = _one(tmp_path, PAIR, None)
    assert _text(example, None) == "Who?\nMe.</s>"
    assert _learned(example, None) == "Me.</s>"


def test_an_instruction_has_its_input_below_it(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Ich", "output": "I"}
    example = _one(tmp_path, row, None)
    assert _text(example, None) == "Translate.\n\nIch\nI</s>"
    assert _learned(example, None) == "I</s>"
    assert _text(_one(tmp_path, row | {"input": ""}, None), None) == "Translate.\nI</s>"


def test_plain_text_is_learned_whole(tmp_path: Path) -> None:
    example = _one(tmp_path, {"text": "Once."})
    assert _text(example) == "Once.</s>"
    assert example.labels == example.input_ids


def test_answer_only_can_be_turned_off(tmp_path: Path) -> None:
    example = _one(tmp_path, PAIR, answer_only=False)
    assert example.labels == example.input_ids


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one\.jsonl:1 is a chat.*instruct model"):
        _one(tmp_path, {"messages": CHAT}, None)


def test_unicode_across_the_border_of_question_and_answer(tmp_path: Path) -> None:
    example = _one(tmp_path, {"prompt": "naïve\u2028?", "completion": "🦊 oui"}, None)
    assert _learned(example, None) == "🦊 oui</s>"


@pytest.mark.parametrize("border", range(3))
def test_a_token_across_the_border_counts_as_answer(tmp_path: Path, border: int) -> None:
    """A tokenizer that merges the line break with what follows must not lose the answer's first token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={t: n for n, t in enumerate([*alphabet, "ĊM", "</s>"])}, merges=[("Ċ", "M")])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    path = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "x" * border, "completion": "Me"}])
    (example,) = load_examples(path, tokenizer)
    kept = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(kept) == "\nMe</s>"


def test_a_csv_header_written_with_spaces_is_read_as_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt, completion \nq, "a, b"\n', encoding="utf-8")
    found, (record,) = read_records(path)
    assert found == "prompt"
    assert [message["content"] for message in record.messages] == ["q", "a, b"]
    path.write_text("prompt,completion\nq, a\n", encoding="utf-8")  # here the space is the text's
    assert read_records(path)[1][0].messages[1]["content"] == " a"


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'a' * 200_000}\n", encoding="utf-8")
    assert len(read_records(path)[1][0].text) == 200_000


def test_csv_has_the_same_shapes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"Who, you?","Me,\nof course."\n', encoding="utf-8-sig")
    (example,) = load_examples(path, byte_tokenizer(None))
    assert _text(example, None) == "Who, you?\nMe,\nof course.</s>"
    chat = tmp_path / "b.csv"
    cell = json.dumps(CHAT).replace('"', '""')
    chat.write_text(f'messages\n"{cell}"\n', encoding="utf-8")
    (example,) = load_examples(chat, byte_tokenizer())
    assert _learned(example) == "Me.<|im_end|>\nYes.<|im_end|>\n"


def test_blank_lines_and_other_keys_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(PAIR | {"id": 7}) + "\n\n" + json.dumps(PAIR), encoding="utf-8")
    assert [record.line for record in read_records(path)[1]] == [2, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl holds no record.*prompt, completion"),
        ("a.jsonl", "\n\n", r"a\.jsonl holds no record"),
        ("a.csv", "prompt,completion\n", r"a\.csv holds no record"),
        ("a.csv", "", r"a\.csv holds no record"),
        ("a.txt", "hello", r"cannot read \.txt.*\.jsonl or \.csv"),
        ("a", "hello", r"cannot read a file without ending"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not JSON.*column 10"),
        ("a.jsonl", '[{"text": "a"}]', r"a\.jsonl:1 holds list.*one object per line"),
        ("a.jsonl", '{"question": "a"}', r"a\.jsonl:1 has keys question: no known shape"),
        ("a.jsonl", "{}", r"a\.jsonl:1 has keys none"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "a"}', r"a\.jsonl:2 lacks text.*read as text"),
        ("a.jsonl", '{"text": 3}', r"a\.jsonl:1: text holds int.*double quotes"),
        ("a.jsonl", '{"text": "  "}', r"a\.jsonl:1: text is empty"),
        ("a.jsonl", '{"prompt": "a", "completion": null}', r"a\.jsonl:1: completion is empty"),
        ("a.jsonl", '{"prompt": "a", "completion": ""}', r"a\.jsonl:1: completion is empty"),
        ("a.jsonl", '{"messages": []}', r"a\.jsonl:1: messages is not a list of messages.*role"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"a\.jsonl:1: message 1 lacks role or content"),
        (
            "a.jsonl",
            '{"messages": [{"role": "bot", "content": "a"}]}',
            r"role 'bot'.*system, user, assistant",
        ),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 3}]}', r"message 1: content holds int"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}', r":1: message 1 is empty"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": " "}]}', r":1: message 1 is empty"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
            r"a\.jsonl:1: message 1 has a part of type 'image_url'; only text",
        ),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}], "tools": "b"}', r":1: tools is not a"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}', r"a\.jsonl:2 holds \\ud83d, half of a character"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, r"a\.jsonl:1 is nested too deeply"),
        (
            "a.jsonl",
            '{"text": "a", "n": ' + "9" * 5000 + "}",
            r"a\.jsonl:1 holds a number of too many digits",
        ),
        ("a.csv", "prompt,completion\na\n", r"a\.csv:2 has another number of columns"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a\.csv:2 has another number of columns"),
        ("a.csv", 'text\n"a" b\n', r"a\.csv:2 is not CSV"),
        ("a.csv", "messages\nhello\n", r"a\.csv:2: the column messages is not JSON"),
    ],
)
def test_mistakes_name_file_line_and_cure(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_records(path)
    assert caught.value.cure


def test_a_missing_file_and_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read the data file .*none\.jsonl: No such file"):
        read_records(tmp_path / "none.jsonl")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2 is not UTF-8"):
        read_records(latin)


def test_a_named_format_wins_over_the_keys(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "both.jsonl", [PAIR | {"text": "T"}])
    assert read_records(path)[0] == "prompt"
    found, records = read_records(path, "text")
    assert (found, records[0].text) == ("text", "T")


def test_long_examples_are_cut_and_counted(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "long.jsonl",
        [PAIR, {"prompt": "a", "completion": "b" * 50}, {"prompt": "a" * 50, "completion": "b"}],
    )
    dataset = load_dataset(path, byte_tokenizer(None), max_length=20)
    assert [len(example.input_ids) for example in dataset.examples] == [9, 20]
    assert (dataset.num_truncated, dataset.left_out_lines) == (2, [3])
    first, second = dataset.warnings()
    assert "2 examples are longer than max_length" in first
    assert "1 examples have no answer" in second
    assert "line 3" in second
    assert load_dataset(path, byte_tokenizer(None)).warnings() == []


def test_a_file_whose_every_answer_is_cut_away_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR, PAIR])
    with pytest.raises(
        DataError, match=r"none of 2 examples has a token to learn within 3 tokens.*max_length"
    ):
        load_examples(path, byte_tokenizer(None), max_length=3)


def test_collate_pads_on_the_side_that_is_asked_for() -> None:
    examples = [Example((5, 6, 7), (IGNORED, 6, 7)), Example((8,), (8,))]
    right = collate(examples, 9)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    left = collate(examples, 9, "left")
    assert left["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, 8]]
    assert {tensor.dtype for tensor in right.values()} == {torch.int64}


def test_a_batch_without_a_token_to_learn_is_refused_by_line() -> None:
    masked = Example((5, 6), (5, IGNORED), line=7)
    with pytest.raises(DataError, match=r"no token to learn; its samples are from lines 7, 9.*data check"):
        collate([masked, Example((8,), (8,), line=9)], 0)
    assert collate([masked, Example((5, 6), (IGNORED, 6))], 0)["labels"].shape == (2, 2)


def test_the_first_token_has_no_loss() -> None:
    assert Example((5,), (5,)).num_learned == 0
    assert Example((5, 6), (5, 6)).num_learned == 1


def test_epoch_orders_are_the_same_on_every_machine() -> None:
    assert epoch_order(8, 0, 0) == [0, 2, 1, 4, 6, 7, 3, 5]
    assert epoch_order(100, 1, 2) == epoch_order(100, 1, 2)
    assert len({tuple(epoch_order(100, seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}) == 4
    assert sorted(epoch_order(100, 1, 2)) == list(range(100))


@pytest.mark.parametrize(("fraction", "held"), [(0.2, 2), (0.001, 1), (0.999, 9)])
def test_a_share_is_held_out_and_neither_side_is_empty(fraction: float, held: int) -> None:
    examples = [Example((n,), (n,)) for n in range(10)]
    train, evaluation = split_examples(examples, fraction, 3)
    assert len(evaluation) == held
    assert sorted(train + evaluation, key=lambda example: example.input_ids) == examples
    assert split_examples(examples, fraction, 3) == (train, evaluation)
    with pytest.raises(DataError, match="cannot be split"):
        split_examples(examples[:1], fraction, 3)


def test_data_check_shows_counts_and_the_mask(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR, PAIR, {"prompt": "x", "completion": "y" * 30}])
    check = check_file(path, byte_tokenizer(), n=1)
    assert check.samples == [
        [("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", False), ("Me.<|im_end|>\n", True)]
    ]
    text = check.render()
    assert "3 examples, read as prompt" in text
    assert "<|im_start|>assistant\n[[Me.<|im_end|>\n]]" in text
    assert f"tokens in all: {sum(check.token_lengths)}, of which 42 are learned" in text
    assert check.token_lengths == sorted(check.token_lengths)
