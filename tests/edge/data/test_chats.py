"""What of a chat is learned, under templates of the shapes that published models have; what is refused."""

from pathlib import Path
from typing import Any

import pytest

from support.edge_runs import CHATML, byte_tokenizer, write_jsonl
from tightbeam.common.errors import DataError
from tightbeam.edge.data import IGNORED, load_examples

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
CALL = {"type": "function", "id": "7", "function": {"name": "look", "arguments": {"at": "clock"}}}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Time?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "noon", "tool_call_id": "7"},
    {"role": "assistant", "content": "It is noon."},
]

# As Qwen3: thoughts are shown after the last user turn only, and an empty thought stands there for none.
THINKS = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content %}{%- set thought = m.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<call>' + (call.function | tojson) + '</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
OPENS = THINKS + "{%- if add_generation_prompt %}{{- '<think>\\n' }}{% endif %}"  # as its thinking-only kin
# As Mistral: no prompt for an answer, and no role system.
STRICT = """
{{- '<s>' }}{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content.strip() + '</s>' }}
{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""
MARKS = """
{%- for m in messages %}{{- '<' + m.role + '>' }}
{%- if m.role == 'assistant' %}{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
{%- else %}{{- m.content + '\n' }}{% endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{% endif %}"""
# A template that shows the thoughts of an answer before its role, in the last message only.
REWRITES = (
    "{% for m in messages %}<|im_start|>{% if loop.last and m.role == 'assistant' %}thinks {% endif %}"
    "{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML


def _learned(tmp_path: Path, template: str, row: list[dict[str, Any]] | dict[str, Any]) -> tuple[str, str]:
    """What is learned of one chat, a bar between answers, and its whole text."""
    tokenizer = byte_tokenizer(template)
    row = {"messages": row} if isinstance(row, list) else row
    (example,) = load_examples(write_jsonl(tmp_path / "one.jsonl", [row]), tokenizer)
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return "|".join(str(tokenizer.decode(run)) for run in runs if run), str(
        tokenizer.decode(list(example.input_ids))
    )


def _thinking(*thoughts: str) -> list[dict[str, Any]]:
    answers = iter(thoughts)
    return [m | {"reasoning_content": next(answers)} if m["role"] == "assistant" else m for m in CHAT]


END = "<|im_end|>\n"
THOUGHT_IN_TEXT = [
    m | {"content": f"<think>\nhm\n</think>\n\n{m['content']}"} if n % 2 else m for n, m in enumerate(CHAT)
]


@pytest.mark.parametrize(
    ("template", "messages", "learned"),
    [
        (CHATML, CHAT, f"Me.{END}|Yes.{END}"),
        (THINKS, CHAT, f"Me.{END}|<think>\n\n</think>\n\nYes.{END}"),
        (THINKS, _thinking("A", "B"), f"Me.{END}|<think>\nB\n</think>\n\nYes.{END}"),
        (THINKS, THOUGHT_IN_TEXT, f"Me.{END}|<think>\nhm\n</think>\n\nYes.{END}"),
        (OPENS, _thinking("A", "B"), f"Me.{END}|B\n</think>\n\nYes.{END}"),
        (STRICT, CHAT, " Me.</s>| Yes.</s>"),
        (MARKS, CHAT, "Me.<|im_end|>|Yes.<|im_end|>"),
        (REWRITES, CHAT, "Me.<|im_end|>|Yes.<|im_end|>"),
        (CHATML, CHAT[1:2] + CHAT, f"Me.{END}|Me.{END}|Yes.{END}"),
    ],
)  # fmt: skip
def test_each_answer_is_learned_with_its_end(
    tmp_path: Path, template: str, messages: list[dict[str, Any]], learned: str
) -> None:
    assert _learned(tmp_path, template, messages)[0] == learned


def test_a_call_of_a_tool_is_learned_whether_or_not_thoughts_before_it_are_shown(tmp_path: Path) -> None:
    call = '\n<call>{"name": "look", "arguments": {"at": "clock"}}</call>'
    closed = "<think>\n\n</think>\n\n"
    learned, text = _learned(tmp_path, THINKS, CALLS)
    assert learned == f"{closed}{call}{END}|{closed}It is noon.{END}"
    learned, longer = _learned(tmp_path, THINKS, [*CALLS, *CHAT[:2]])
    assert learned == f"{call}{END}|It is noon.{END}|{closed}Me.{END}"
    assert "noon" in text
    assert closed + call not in longer  # the same message, shown otherwise once another turn follows


def test_what_the_template_does_not_show_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one\.jsonl:1: .* does not show the key 'tool_calls' of message 2"):
        _learned(tmp_path, CHATML, CALLS)
    weighted = [CHAT[0], CHAT[1] | {"weight": 0}]
    with pytest.raises(DataError, match="the key 'weight' of message 2"):
        _learned(tmp_path, CHATML, weighted)
    tools = {"messages": CHAT, "tools": [CALL]}
    with pytest.raises(DataError, match="the key 'tools'"):
        _learned(tmp_path, CHATML, tools)
    assert '"look"' in _learned(tmp_path, TURNS_TOOLS, tools)[1]
    deaf = CHATML.replace(
        "<|im_start|>{{", "{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{"
    )
    with pytest.raises(DataError, match="does not show message 1, of the role system"):
        _learned(tmp_path, deaf, [{"role": "system", "content": "Be short."}, *CHAT])


def test_names_and_empty_keys_of_messages_do_no_harm(tmp_path: Path) -> None:
    odd = [m | {"id": "4", "name": "x", "tool_calls": [], "refusal": None} for m in CHAT]
    assert _learned(tmp_path, CHATML, odd) == _learned(tmp_path, CHATML, CHAT)


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "M"}, {"type": "text", "text": "e."}]
    chat = [CHAT[0], CHAT[1] | {"content": parts}]
    assert _learned(tmp_path, CHATML, chat)[0] == f"Me.{END}"


def test_a_template_that_raises_is_one_line_with_the_place(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be short."}, *CHAT]
    with pytest.raises(DataError, match=r"one\.jsonl:1: .*refuses this chat \(Only user and assistant roles"):
        _learned(tmp_path, STRICT, chat)


def test_a_chat_without_an_answer_is_not_told_to_be_longer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one\.jsonl:1: no message has the role assistant.*Add the answer"):
        _learned(tmp_path, CHATML, CHAT[:1])


def test_borders_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    twice = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if loop.last %}.{% endif %}{{ m.content }}")
    with pytest.raises(DataError, match=r"one\.jsonl:1: .*rewrites message 2.*answer_only=false"):
        _learned(tmp_path, twice, CHAT)


def test_the_same_chat_gives_the_same_tokens_on_every_day(tmp_path: Path) -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML
    assert _learned(tmp_path, dated, CHAT)[1].startswith("26 Jul 2024<")


def test_a_tokenizer_that_ends_texts_itself_is_not_helped(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for row, learned in (
        ({"text": "Me."}, "<s>Me.</s>"),
        ({"prompt": "Who?", "completion": "Me."}, "Me.</s>"),
    ):
        (example,) = load_examples(write_jsonl(tmp_path / "one.jsonl", [row]), tokenizer)
        kept = [label for label in example.labels if label != IGNORED]
        assert tokenizer.decode(kept) == learned
