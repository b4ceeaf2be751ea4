"""What must be installed for an experiment, asked before anything slow is imported or started."""

import importlib.util
import re
from importlib import metadata

from tightbeam.common.errors import UsageError

__all__ = ["missing", "require_accountant", "require_flower", "require_ray"]

_FLOWER = ((1, 41), (1, 43))  # from, below


def require_flower() -> None:
    """Refuse a Flower whose interfaces this package does not know.

    Raises:
        UsageError: another version than the supported ones.

    """
    found = metadata.version("flwr")
    version = tuple(int(part) for part in found.split(".")[:2])
    if not _FLOWER[0] <= version < _FLOWER[1]:
        raise UsageError(f"flwr {found} is installed.", cure='Run `pip install "flwr>=1.41,<1.43"`.')


def require_ray() -> None:
    """Refuse to start without Ray.

    Raises:
        UsageError: the extra is not installed.

    """
    if importlib.util.find_spec("ray") is None:
        raise missing("The Ray runtime needs the package ray.", "ray")


def require_accountant() -> None:
    """Refuse to start a private federation that could not say what its privacy is.

    Raises:
        UsageError: Flower's accountant is not installed.

    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise missing("strategy.privacy needs Flower's accountant.", "privacy")


def missing(what: str, extra: str) -> UsageError:
    """Build the error for an extra that is not installed; what is in it installs from anywhere."""
    lines = [line.partition(";") for line in metadata.requires("tightbeam") or ()]
    wanted = [f'"{name.strip()}"' for name, _, marker in lines if re.search(rf"extra == .{extra}.", marker)]
    return UsageError(what, cure=f"Run `pip install {' '.join(wanted)}`.")
