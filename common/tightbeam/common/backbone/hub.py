"""A model as people name it: a folder, or an id on the hub, which is asked once whether it answers."""

import ssl
import urllib.error
import urllib.request
from pathlib import Path

from tightbeam.common.errors import UsageError

__all__ = ["model_source", "no_such_model", "resolve_model"]

_ANSWER_S = 3.0
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def resolve_model(model: str) -> Path:
    """A folder for `model`: the folder itself, or a snapshot of a hub repository."""
    source, offline = model_source(model)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=_FILES, local_files_only=offline))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise no_such_model(model, offline, error) from error


def model_source(model: str) -> tuple[str, bool]:
    """What to load `model` from, and whether from this machine alone, as when the hub does not answer.

    Raises `UsageError` for what can be neither a folder nor a hub id.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), True
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise UsageError(
            f"There is no folder {model!r}, and no model on the hub can be named so.",
            cure="Give --model a folder saved by save_pretrained(), or a hub id such as owner/name.",
        ) from error
    return model, constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)


def no_such_model(model: str, offline: bool, error: Exception) -> UsageError:
    """Build the error for a `model` that came from nowhere."""
    why = "the hub cannot be reached" if offline else f"the hub did not give it ({type(error).__name__})"
    return UsageError(
        f"{model!r} is neither a folder nor in this machine's cache of the hub, and {why}.",
        cure="Check the spelling of --model, or try again where the hub can be reached.",
    )


def _answers(endpoint: str) -> bool:
    """One try, through proxies too; the hub's own client takes most of a minute to give up."""
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310  the hub's own constant
    try:
        urllib.request.urlopen(request, timeout=_ANSWER_S).close()  # noqa: S310
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", error), ssl.SSLError)  # whom to trust, its client knows
    return True
