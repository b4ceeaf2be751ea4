"""The edge's copy of its own weights.

Fetched blob by blob, resumable, verified, shared between runs and cuts.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tightbeam.common.backbone import PROJECTION_BLOB, Anatomy, fingerprint, open_checkpoint
from tightbeam.common.backbone.bounds import MAX_BLOCKS, MAX_WIDTH
from tightbeam.common.backbone.checkpoint import AUXILIARY_FILES
from tightbeam.common.errors import FingerprintError, IntegrityError, ProtocolError, TightbeamError
from tightbeam.common.files import atomic_write
from tightbeam.common.locks import lock_file
from tightbeam.proto.backbone_pb2 import Blob, Card

__all__ = ["BlobStore", "WeightSource", "check_card", "local_source"]

_NO_WEIGHTS = ("file/", PROJECTION_BLOB)  # blobs that the fingerprint does not cover
_ONE_DOWNLOAD = threading.Lock()  # within a process; between processes, partial files have their own names
_TEXT = 500  # letters
_FILE_BYTES = 256 << 20
_ELSEWHERE = "Free disk space, or set TIGHTBEAM_CACHE to a folder elsewhere."
Fetch = Callable[[Blob, int], Iterator[bytes]]  # blob, offset -> pieces
Progress = Callable[[str, int, int], None]  # name, bytes done, bytes in all
WeightSource = Callable[[str], Tensor | None]  # parameter name -> tensor


def check_card(card: Card) -> None:
    """The card's fingerprint must follow from its config and blob list.

    Otherwise the weights are not those.
    """
    texts = [card.model, card.version, card.dtype, card.fingerprint, *(blob.name for blob in card.blobs)]
    if not all(text.isprintable() and len(text) <= _TEXT for text in texts):
        raise ProtocolError("The cloud's card holds text that cannot be printed, or too much of it.")
    if not (1 <= card.num_blocks <= MAX_BLOCKS and 1 <= card.hidden_size <= MAX_WIDTH):
        raise ProtocolError(f"The cloud serves {card.num_blocks} blocks of width {card.hidden_size}.")
    if any(blob.num_bytes > _FILE_BYTES for blob in card.blobs if blob.name.startswith("file/")):
        raise ProtocolError("The cloud's card names a tokenizer or config file of more than 256 MB.")
    if not all(re.fullmatch("[0-9a-f]{64}", blob.sha256) for blob in card.blobs):
        raise ProtocolError(
            "The cloud names weights by something else than SHA-256."
        )  # it is a file name here
    weights = {blob.name: blob.sha256 for blob in card.blobs if not blob.name.startswith(_NO_WEIGHTS)}
    try:
        config = json.loads(card.config_json)
    except ValueError as error:
        raise ProtocolError("The cloud's model config is not JSON.") from error
    if not isinstance(config, dict):
        raise ProtocolError("The cloud's model config is no mapping.")
    if fingerprint(config, weights) != card.fingerprint:
        raise FingerprintError(
            "The cloud's list of weights does not have the fingerprint that it announces.",
            cure="Do not use this cloud; tell its operator.",
        )


class BlobStore:
    """Content-addressed files in one folder."""

    def __init__(
        self, folder: Path, fetch: Fetch, progress: Progress = lambda name, done, total: None
    ) -> None:
        self._folder, self._fetch, self._progress = folder / "blobs", fetch, progress
        self._intact: set[tuple[str, int]] = set()  # (SHA-256, time of change) of files that were read once

    def get(self, blob: Blob) -> Path:
        """The blob's file; downloaded from where an earlier attempt stopped, and verified."""
        with _ONE_DOWNLOAD:
            return self._get(blob)

    def _get(self, blob: Blob) -> Path:
        target = self._folder / blob.sha256
        if target.is_file() and self._holds(target, blob):
            return target
        self._folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(self._folder).free
        if blob.num_bytes > free_bytes:
            raise TightbeamError(
                f"{blob.name!r} has {blob.num_bytes / 1e9:.2f} GB, and {self._folder} is on a disk with "
                f"{free_bytes / 1e9:.2f} GB free.",
                cure=_ELSEWHERE,
            )
        try:
            partial, stream = self._part(blob)
            with stream:
                self._download(blob, stream)
                stream.seek(0)
                intact = _is(stream, blob)  # what is on disk, whoever wrote there
                if intact and sys.platform != "win32":
                    partial.replace(target)  # still locked: nobody takes it for a leftover
            if not intact:
                partial.unlink()
                raise IntegrityError(
                    f"The download of {blob.name!r} does not have the hash that the cloud announced.",
                    cure="Try again.",
                )
            if sys.platform == "win32":  # where an open file cannot be renamed
                partial.replace(target)
        except OSError as error:
            raise TightbeamError(f"Cannot write to {self._folder}: {error}.", cure=_ELSEWHERE) from error
        self._intact.add((blob.sha256, target.stat().st_mtime_ns))
        return target

    def _holds(self, target: Path, blob: Blob) -> bool:
        """Whether a file of the cache is the blob; it is read once in the life of this process."""
        key = (blob.sha256, target.stat().st_mtime_ns)
        if key not in self._intact:
            with target.open("rb") as stream:
                if not _is(stream, blob):
                    return False
            self._intact.add(key)
        return True

    def _part(self, blob: Blob) -> tuple[Path, BufferedIOBase]:
        """A partial file that is this process's alone: one that a killed download left, or a new one.

        Whoever writes holds its lock, which also tells between containers that share the folder.
        """
        for path in sorted(self._folder.glob(f"{blob.sha256}.*.part")):
            with contextlib.suppress(OSError):  # another process has it, or was faster
                stream = path.open("r+b")
                try:
                    lock_file(stream.fileno())
                    found = os.fstat(stream.fileno())
                    if os.path.samestat(path.stat(), found) and found.st_size < blob.num_bytes:
                        return path, stream
                except OSError:
                    pass
                stream.close()
        path = self._folder / f"{blob.sha256}.{uuid.uuid4().hex}.part"
        stream = path.open("x+b")
        with contextlib.suppress(OSError):  # a file system without locks: nobody takes over what is left here
            lock_file(stream.fileno())
        return path, stream

    def _download(self, blob: Blob, stream: BufferedIOBase) -> None:
        done = stream.seek(0, os.SEEK_END)
        for piece in self._fetch(blob, done) if done < blob.num_bytes else ():
            stream.write(piece)
            done += len(piece)
            self._progress(blob.name, done, blob.num_bytes)
            if done > blob.num_bytes:
                break  # a cloud that sends without end must not fill the disk
        stream.flush()
        os.fsync(stream.fileno())

    def source(self, blobs: list[Blob]) -> WeightSource:
        """Read parameters out of weight blobs, fetching what is missing."""
        files: dict[str, Path] = {}
        for blob in blobs:
            path = self.get(blob)
            try:
                with safe_open(path, framework="pt") as file:
                    files.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise IntegrityError(
                    f"{path} is not a safetensors file.", cure="Delete it and try again."
                ) from error

        def load(name: str) -> Tensor | None:
            if name not in files:
                return None
            with safe_open(files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
            return tensor

        return load

    def files(self, card: Card) -> Path:
        """Folder with the config and tokenizer files, as `AutoTokenizer.from_pretrained` takes it."""
        folder = self._folder.parent / "models" / card.fingerprint[:16]
        folder.mkdir(parents=True, exist_ok=True)
        for blob in card.blobs:
            name = blob.name.removeprefix("file/")
            if (
                blob.name.startswith("file/") and name in AUXILIARY_FILES
            ):  # never a path of the peer's choosing
                atomic_write(folder / name, self.get(blob).read_bytes())  # another process may be reading it
        return folder


def _is(stream: BufferedIOBase, blob: Blob) -> bool:
    size = os.fstat(stream.fileno()).st_size
    return size == blob.num_bytes and hashlib.file_digest(stream, "sha256").hexdigest() == blob.sha256


def local_source(folder: Path, card: Card, model: PreTrainedModel, anatomy: Anatomy) -> WeightSource:
    """Slice a local checkpoint instead of downloading; it must have the cloud's fingerprint."""
    checkpoint = open_checkpoint(folder)
    checkpoint.align(model, anatomy)
    hashes = {blob.name: blob.sha256 for blob in checkpoint.weight_blobs(anatomy)}
    if fingerprint(checkpoint.config, hashes) != card.fingerprint:
        raise FingerprintError(
            f"{folder} is not the backbone that the cloud serves.",
            cure="Leave model.local_path out to download it.",
        )
    return lambda name: checkpoint.load(name) if name in checkpoint.tensors else None
