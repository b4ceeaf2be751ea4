"""A checkpoint on disk as content-addressed blobs: one per block, one each for embedding, head and the rest.

Blobs are safetensors files that are never built: a header made here plus byte ranges of the files on disk.
An edge fetches only the blobs of its cut, and cuts share them. The fingerprint is a SHA-256 over the config
and the blobs' hashes, so that a list of blobs can be checked against it without any weights.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tightbeam.common.backbone.families import Anatomy
from tightbeam.common.errors import UnsupportedModelError, UsageError

__all__ = ["AUXILIARY_FILES", "Blob", "Checkpoint", "TensorRange", "fingerprint"]

AUXILIARY_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorRange:
    """Where one tensor lies: file, first byte, length; its dtype in safetensors' words and its shape."""

    file: Path
    start: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Blob:
    """A byte string assembled from a header and file ranges; identified by its SHA-256."""

    name: str
    header: bytes
    ranges: tuple[tuple[Path, int, int], ...]  # file, start, length

    @cached_property
    def num_bytes(self) -> int:
        """Length of the whole blob."""
        return len(self.header) + sum(length for _, _, length in self.ranges)

    @cached_property
    def sha256(self) -> str:
        """Hex digest; reads everything once."""
        digest = hashlib.sha256()
        for piece in self.read(0):
            digest.update(piece)
        return digest.hexdigest()

    def read(self, offset: int) -> Iterator[bytes]:
        """The bytes from `offset` on, in pieces of at most 1 MiB."""
        if offset < len(self.header):
            yield self.header[offset:]
        skip = max(0, offset - len(self.header))
        for file, start, length in self.ranges:
            if skip >= length:
                skip -= length
                continue
            with file.open("rb") as stream:
                stream.seek(start + skip)
                left, skip = length - skip, 0
                while left:
                    piece = stream.read(min(left, _READ_BYTES))
                    if not piece:
                        raise UsageError(
                            f"{file} is shorter than its header says.", cure="Fetch the model again."
                        )
                    left -= len(piece)
                    yield piece


class Checkpoint:
    """A folder with `config.json` and safetensors files.

    Tensor names are those of the model's own parameters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise UsageError(
                f"{folder} has no config.json.", cure="Pass a folder saved by save_pretrained()."
            )
        try:
            self.config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{config_file} is not JSON: {error}.", cure="Fetch the model again.") from error
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UnsupportedModelError(
                f"{folder} holds no .safetensors files.",
                cure="Convert it once: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder).",
            )
        self.tensors: dict[str, TensorRange] = {}
        for file in files:
            self.tensors.update(_read_header(file))

    def align(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        """Name the tensors as `model` (a skeleton will do) does, and drop what it has no use for.

        Base-model checkpoints lack a prefix. A tied head may be stored twice; one with other values than the
        embedding stays, for transformers then does not tie it, whatever the config says.
        """
        expected, prefix = model.state_dict(), model.base_model_prefix
        for name in list(self.tensors):
            if name not in expected and f"{prefix}.{name}" in expected:
                self.tensors[f"{prefix}.{name}"] = self.tensors.pop(name)
        head, embedding = (f"{path}.weight" for path in (anatomy.head_path, anatomy.embedding_path))
        if model.config.tie_word_embeddings and self._equal(head, embedding):
            del self.tensors[head]
        self.tensors = {name: self.tensors[name] for name in sorted(self.tensors) if name in expected}

    def load(self, name: str) -> Tensor:
        """Read one tensor, a copy on the CPU in the stored dtype."""
        place = self.tensors[name]
        try:
            with safe_open(place.file, framework="pt") as file:
                stored = name if name in file.keys() else name.partition(".")[2]  # noqa: SIM118 - not a dict
                tensor: Tensor = file.get_tensor(stored)
        except SafetensorError as error:
            raise UsageError(
                f"{place.file} is damaged or cut short: {error}.", cure="Fetch the model again."
            ) from error
        return tensor

    def _equal(self, one: str, other: str) -> bool:
        if not {one, other} <= self.tensors.keys():
            return False
        first, second = self.tensors[one], self.tensors[other]
        alike = (first.dtype, first.shape) == (second.dtype, second.shape)
        return alike and torch.equal(self.load(one), self.load(other))

    def weight_blobs(self, anatomy: Anatomy) -> list[Blob]:
        """All weights, grouped by the part of the model that an edge may want."""
        groups: dict[str, dict[str, TensorRange]] = {}
        for name, place in self.tensors.items():
            groups.setdefault(_group(name, anatomy), {})[name] = place
        return [_safetensors_blob(name, groups[name]) for name in sorted(groups)]

    def file_blobs(self) -> list[Blob]:
        """Tokenizer and config files."""
        return [
            Blob(f"file/{name}", b"", ((path, 0, path.stat().st_size),))
            for name in AUXILIARY_FILES
            if (path := self.folder / name).is_file()
        ]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most bytes are stored in."""
        sizes: dict[str, int] = {}
        for place in self.tensors.values():
            sizes[place.dtype] = sizes.get(place.dtype, 0) + place.num_bytes
        stored = max(sizes, key=lambda name: sizes[name])
        if stored not in _DTYPES:
            raise UnsupportedModelError(
                f"Weights stored as {stored} are not supported.", cure="Save as BF16 or F32."
            )
        return _DTYPES[stored]


def fingerprint(config: Mapping[str, Any], weight_hashes: Mapping[str, str]) -> str:
    """SHA-256 (hex) over the config and every weight blob's `{name: sha256}`."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(b"tightbeam/fingerprint/1\0" + hashlib.sha256(canonical).digest())
    for name in sorted(weight_hashes):
        digest.update(f"{name}\0{weight_hashes[name]}\n".encode())
    return digest.hexdigest()


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _read_header(file: Path) -> dict[str, TensorRange]:
    """The safetensors header: 8 bytes little-endian length, then JSON (huggingface/safetensors, Format)."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= size <= 100_000_000:
            raise UsageError(f"{file} is not a safetensors file.", cure="Fetch the model again.")
        try:
            header = json.loads(stream.read(size))
        except ValueError as error:
            raise UsageError(
                f"{file} is cut short or not a safetensors file.", cure="Fetch the model again."
            ) from error
    header.pop("__metadata__", None)
    return {
        name: TensorRange(
            file,
            8 + size + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            entry["dtype"],
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }


def _safetensors_blob(name: str, tensors: Mapping[str, TensorRange]) -> Blob:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor_name, place in tensors.items():
        entries[tensor_name] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [offset, offset + place.num_bytes],
        }
        offset += place.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned to 8 bytes
    return Blob(
        name,
        struct.pack("<Q", len(text)) + text,
        tuple((p.file, p.start, p.num_bytes) for p in tensors.values()),
    )


def _group(name: str, anatomy: Anatomy) -> str:
    if match := re.match(rf"{re.escape(anatomy.blocks_path)}\.(\d+)\.", name):
        return f"block.{match[1]}"
    if name.startswith(anatomy.embedding_path + "."):
        return "embedding"
    return "head" if name.startswith(anatomy.head_path + ".") else "rest"
