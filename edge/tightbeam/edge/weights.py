"""The edge's copy of its own weights.

Fetched blob by blob, resumable, verified, shared between runs and cuts.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tightbeam.common.backbone import PROJECTION_BLOB, Anatomy, fingerprint, open_checkpoint
from tightbeam.common.backbone.checkpoint import AUXILIARY_FILES
from tightbeam.common.errors import FingerprintError, IntegrityError, ProtocolError, TightbeamError
from tightbeam.common.runs import atomic_write
from tightbeam.proto.backbone_pb2 import Blob, Card

__all__ = ["BlobStore", "WeightSource", "check_card", "local_source"]

_NO_WEIGHTS = ("file/", PROJECTION_BLOB)  # blobs that the fingerprint does not cover
_ONE_DOWNLOAD = threading.Lock()  # within a process; between processes, partial files have their own names
Fetch = Callable[[str, int], Iterator[bytes]]  # sha256, offset -> pieces
Progress = Callable[[str, int, int], None]  # name, bytes done, bytes in all
WeightSource = Callable[[str], Tensor | None]  # parameter name -> tensor


def check_card(card: Card) -> None:
    """The card's fingerprint must follow from its config and blob list.

    Otherwise the weights are not those.
    """
    if not all(re.fullmatch("[0-9a-f]{64}", blob.sha256) for blob in card.blobs):
        raise ProtocolError(
            "The cloud names weights by something else than SHA-256."
        )  # it is a file name here
    weights = {blob.name: blob.sha256 for blob in card.blobs if not blob.name.startswith(_NO_WEIGHTS)}
    try:
        config = json.loads(card.config_json)
    except ValueError as error:
        raise ProtocolError("The cloud's model config is not JSON.") from error
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

    def get(self, blob: Blob) -> Path:
        """The blob's file; downloaded from where an earlier attempt stopped, and verified."""
        with _ONE_DOWNLOAD:
            return self._get(blob)

    def _get(self, blob: Blob) -> Path:
        target = self._folder / blob.sha256
        if target.is_file() and target.stat().st_size == blob.num_bytes:
            return target
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{blob.sha256}.{os.getpid()}.part")
        for leftover in sorted(self._folder.glob(f"{blob.sha256}.*.part")):
            owner = re.fullmatch(r".*\.(\d+)\.part", leftover.name)
            if owner and not psutil.pid_exists(int(owner[1])):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    leftover.replace(partial)  # a killed download goes on where it stopped
        try:
            self._download(blob, partial)
        except OSError as error:
            raise TightbeamError(
                f"Cannot write {partial}: {error}.",
                cure="Free disk space or set TIGHTBEAM_CACHE to another folder.",
            ) from error
        partial.replace(target)
        return target

    def _download(self, blob: Blob, partial: Path) -> None:
        digest = hashlib.sha256()
        if partial.exists():
            with partial.open("rb") as stopped:
                digest = hashlib.file_digest(stopped, "sha256")
        with partial.open("ab") as stream:
            done = stream.tell()
            for piece in self._fetch(blob.sha256, done) if done < blob.num_bytes else ():
                stream.write(piece)
                digest.update(piece)
                done += len(piece)
                self._progress(blob.name, done, blob.num_bytes)
                if done > blob.num_bytes:
                    break  # a cloud that sends without end must not fill the disk
        if done != blob.num_bytes or digest.hexdigest() != blob.sha256:
            partial.unlink()
            raise IntegrityError(
                f"The download of {blob.name!r} does not have the hash that the cloud announced.",
                cure="Try again.",
            )

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
