"""What may be another when an experiment is resumed: the one table, and what comes of a change.

All else decides who has which data and which shapes, so another value is another experiment.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tightbeam.common.errors import RecipeError

__all__ = ["MAY_CHANGE", "changes", "scenario_told"]

MAY_CHANGE = (
    "rounds", "sample", "wait_for", "eval_every", "eval_sample", "train.lr", "train.max_grad_norm",
    "client.budget", "groups.*.budget", "strategy.max_weight", "faults.*",
)  # fmt: skip
"""Keys of a scenario; docs/federation.md has the same table."""


def scenario_told(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The numbers that a ledger's rows go by last; None before it has begun."""
    told = [row["scenario"] for row in rows if row["row"] in ("experiment", "changed")]
    return dict(told[-1]) if told else None


def changes(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], done: int) -> list[str]:
    """What is another now, in words; nothing when all is the same.

    Raises:
        RecipeError: a change that makes it another experiment.

    """
    before, now = dict(_leaves(old)), dict(_leaves(new))
    found = [key for key in now if key in before and before[key] != now[key]]
    found += before.keys() ^ now.keys()
    if list(old.get("groups") or ()) != list(new.get("groups") or ()):  # which comes first decides who is in
        found.append("groups")
    refused = sorted({key for key in found if not any(fnmatch.fnmatch(key, one) for one in MAY_CHANGE)})
    if refused:
        raise RecipeError(
            f"{folder} was started with another {', '.join(refused)}.",
            cure=f"Resume with the same scenario, or give another output.name. {_allowed()}",
        )
    if new["rounds"] < done:
        raise RecipeError(
            f"rounds is {new['rounds']}, but {done} are done.", cure=f"Set rounds to {done} or more."
        )
    return [f"{key} from {before.get(key)} to {now.get(key)}" for key in sorted(set(found))]


def _allowed() -> str:
    return f"What may change is {', '.join(MAY_CHANGE)}."


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a budget is one value."""
    for name, value in section.items():
        if isinstance(value, Mapping) and value and name != "budget":
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
