"""What a client has answered in secure rounds, on disk: it must know after a restart, too.

Where a server could choose the folder, it could choose an empty one: the folder is the client's own business.
"""

import json
import os
from pathlib import Path

from tightbeam.common.errors import IntegrityError
from tightbeam.common.files import sync_folder, write_failed
from tightbeam.federation.secagg.answered import Cohort

__all__ = ["AnsweredFolder"]


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
