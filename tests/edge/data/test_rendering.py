"""A template that takes time, memory or text without end is refused by line; the next chat is rendered."""

from pathlib import Path

import psutil
import pytest

from support.edge_runs import CHATML, byte_tokenizer, write_jsonl
from tightbeam.common.errors import DataError
from tightbeam.edge.data import load_examples, rendering

CHAT = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ATTACKS = {
    "nested loops": LOOPS,
    "nested loops where the answer is": "{% generation %}" + LOOPS + "{% endgeneration %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a repeated letter": "{{ 'A' * 3000000000 }}",
    "a wide filter": "{{ 'A' | center(3000000000) }}",
    "a wide format": "{{ '%3000000000d' % 1 }}",
    "doubling": "{% set a = namespace(s='A') %}{% for i in range(40) %}{% set a.s = a.s ~ a.s %}{% endfor %}",
    "a long list": "{{ ([1] * 3000000000) | length }}",
    "a long text": "{% for i in range(9999) %}{{ 'A' * 1000 }}{% endfor %}",
}


def _text(tmp_path: Path, template: str) -> str:
    tokenizer = byte_tokenizer(template)
    (example,) = load_examples(write_jsonl(tmp_path / "one.jsonl", [CHAT]), tokenizer)
    return str(tokenizer.decode(list(example.input_ids)))


@pytest.mark.parametrize("template", ATTACKS.values(), ids=ATTACKS)
def test_a_template_without_bounds_is_one_line(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "MOST_SECONDS", 1.0)
    with pytest.raises(DataError, match=r"one\.jsonl:1: to render this chat the chat template takes more"):
        _text(tmp_path, template)


def test_the_next_chat_is_rendered(tmp_path: Path) -> None:
    expected = _text(tmp_path, CHATML)
    assert "Me." in expected
    with pytest.raises(DataError, match="takes more"):
        _text(tmp_path, ATTACKS["a long text"])
    assert _text(tmp_path, CHATML) == expected


def test_memory_is_bounded_where_the_system_does_not_refuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "MOST_BYTES", 64 << 20)  # the process itself still allows more
    with pytest.raises(DataError, match="takes more than 64 MB of memory"):
        _text(tmp_path, "{% set a = 'A' * 200000000 %}" + LOOPS + "{{ a }}")


def test_an_interrupt_leaves_no_answer_for_the_next_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _text(tmp_path, CHATML)
    process = psutil.Process(rendering._worker._process.pid) if rendering._worker else None

    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rendering._Worker, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _text(tmp_path, CHATML.replace("im_start", "im_begin"))
    assert process is not None
    assert not process.is_running()
    assert _text(tmp_path, CHATML) == expected
