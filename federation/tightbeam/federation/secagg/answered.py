"""What a client has answered: for each model the one cohort whose sum it has agreed to unmask.

Two sums of one model differ by the updates of those who are in one of them only. So a client agrees to one
cohort per model; sums of one model then are of the same clients or have none in common, and whoever adds and
subtracts them gets nothing about fewer clients than a cohort has. The same cohort may be asked again: a round
that was cut off is done once more, and its sum is no news. Vectors without a consent open nothing and do not
count.

Where a server could choose the folder, it could choose an empty one: the folder is the client's own business.
"""

import json
import os
from pathlib import Path
from typing import Protocol

from tightbeam.common.errors import IntegrityError
from tightbeam.common.files import sync_folder, write_failed

__all__ = ["Answered", "AnsweredFolder"]

Cohort = tuple[str, ...]


class Answered(Protocol):
    """Cohorts by the digest of their model; a dict is one, for as long as its process lives."""

    def get(self, model_sha256: bytes, /) -> Cohort | None:
        """The cohort for which this model was answered."""
        ...  # a Protocol's body

    def setdefault(self, model_sha256: bytes, cohort: Cohort, /) -> Cohort:
        """Keep the cohort unless there is one; the one that is kept."""
        ...  # a Protocol's body


class AnsweredFolder:
    """One file per model, written before the consent is sent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, model_sha256: bytes, /) -> Cohort | None:
        """Read it.

        Raises:
            IntegrityError: the file is cut short.

        """
        path = self._path(model_sha256)
        try:
            return tuple(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise IntegrityError(
                f"{path} is cut short: the client was ended while it wrote it.",
                cure="Nothing had been sent. Remove the file, then go on.",
            ) from error

    def setdefault(self, model_sha256: bytes, cohort: Cohort, /) -> Cohort:
        """Write it unless there is one, also where two processes of a client want to at once.

        Raises:
            IntegrityError: see `get`.
            TightbeamError: the folder cannot be written.

        """
        path = self._path(model_sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                json.dump(cohort, file)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(path.parent)
        except FileExistsError:
            return self.get(model_sha256) or cohort
        except OSError as error:
            raise write_failed(path, error) from error
        return cohort

    def _path(self, model_sha256: bytes) -> Path:
        return self._folder / f"{model_sha256.hex()}.json"
