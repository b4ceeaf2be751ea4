"""The templates of published models, which TRL carries: answers are learned and nothing else, or refused."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from support.edge_runs import byte_tokenizer, write_jsonl
from tightbeam.common.errors import DataError
from tightbeam.edge.data import IGNORED, load_examples
from tightbeam.edge.data.rendering import TemplateFault, render

_TRL = find_spec("trl")
assert _TRL is not None
assert _TRL.origin is not None
TEMPLATES = sorted((Path(_TRL.origin).parent / "chat_templates").glob("*.jinja"))
OF_IMAGES = ("idefics", "llava", "smolvlm")  # these want content in parts, never as text

CALL: dict[str, Any] = {
    "type": "function",
    "id": "123456789",
    "function": {"name": "look", "arguments": {"at": "CLOCK"}},
}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Question-1"},
    {"role": "assistant", "content": "Answer-1"},
    {"role": "user", "content": "Question-2"},
    {"role": "assistant", "content": "Answer-2"},
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Question-0"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "look", "content": "Question-of-tool", "tool_call_id": "123456789"},
    {"role": "assistant", "content": "Answer-0"},
]
THOUGHTS = [m | {"reasoning_content": f"Answer-{n}-thought"} if n % 2 else m for n, m in enumerate(TURNS)]


def _runs(tmp_path: Path, template: str, chat: list[dict[str, Any]]) -> tuple[list[str], str]:
    """What is learned, run by run, and the rest."""
    tokenizer = byte_tokenizer(template)
    (example,) = load_examples(
        write_jsonl(tmp_path / "one.jsonl", [{"messages": chat}]), tokenizer, max_length=100_000
    )
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    rest = [t for t, label in zip(example.input_ids, example.labels, strict=True) if label == IGNORED]
    return [str(tokenizer.decode(run)) for run in runs if run], str(tokenizer.decode(rest))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_two_answers(tmp_path: Path, path: Path) -> None:
    template = path.read_text(encoding="utf-8")
    if path.stem.startswith(OF_IMAGES):
        with pytest.raises(DataError, match=r"one\.jsonl:1: the chat template (refuses|does not show)"):
            _runs(tmp_path, template, TURNS)
        return
    runs, rest = _runs(tmp_path, template, TURNS)
    assert [answer in run for answer, run in zip(("Answer-1", "Answer-2"), runs, strict=True)] == [True] * 2
    assert "Question" not in "".join(runs)
    assert "Answer" not in rest


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_calls_and_thoughts_are_learned_or_refused(tmp_path: Path, path: Path) -> None:
    template = path.read_text(encoding="utf-8")
    for chat, number in ((CALLS, 2), (CALLS + TURNS, 4), (THOUGHTS, 2)):
        try:
            runs, rest = _runs(tmp_path, template, chat)
        except DataError as error:
            assert "one.jsonl:1: the chat template" in error.message  # noqa: PT017
            assert "rewrites" not in error.message  # noqa: PT017  every border can be told
            continue
        assert len(runs) == number
        assert "Question" not in "".join(runs)
        assert "Answer" not in rest
        assert "Answer-1" in "".join(runs) or chat is CALLS
        if chat is not THOUGHTS:
            assert "look" in runs[0]
            assert "CLOCK" in runs[0]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_arguments_of_calls_may_be_text_as_openais_api_has_them(tmp_path: Path, path: Path) -> None:
    function = CALL["function"] | {"arguments": '{"at": "CLOCK"}'}
    as_text = [m | {"tool_calls": [CALL | {"function": function}]} if "tool_calls" in m else m for m in CALLS]
    template = path.read_text(encoding="utf-8")
    outcomes = []
    for chat in (CALLS, as_text):
        try:
            outcomes.append(str(_runs(tmp_path, template, chat)))
        except DataError as error:
            outcomes.append(error.message)
    assert outcomes[0] == outcomes[1]
    assert '\\"' not in outcomes[0]
    assert path.stem != "deepseekv3" or "CLOCK" in outcomes[0]  # which wants text


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_text_is_that_of_transformers(path: Path) -> None:
    template = path.read_text(encoding="utf-8").replace("strftime_now", "str")  # another day, another text
    tokenizer = byte_tokenizer(template)
    for chat in (TURNS, CALLS, THOUGHTS):
        for ask in (False, True):
            try:
                expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
            except Exception as error:
                with pytest.raises(TemplateFault, match=re.escape(str(error)[:50])):
                    render(template, chat, None, tokenizer.special_tokens_map, ask=ask)
                continue
            assert render(template, chat, None, tokenizer.special_tokens_map, ask=ask) == (expected, [])


def test_there_are_templates() -> None:
    assert len(TEMPLATES) > 60
