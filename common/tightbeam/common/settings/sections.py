"""Sections of settings: pydantic models that refuse unknown keys, and the overrides of a command line."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tightbeam.common.errors import RecipeError
from tightbeam.common.settings.messages import explain
from tightbeam.common.settings.yaml_text import parse_value

__all__ = ["Section", "checked_section"]


class Section(BaseModel):
    """Frozen, and a key nobody knows is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)


def checked_section(
    section: type[SectionT],
    mapping: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    origin: str,
    lines: Mapping[str, int] | None = None,
    cure: str,
) -> SectionT:
    """Check plain data as any section, such as a scenario of a simulation; raises as `load_recipe`."""
    data = json.loads(json.dumps(mapping, default=str))  # a private copy of plain YAML data
    places = {key: f"{origin}:{line}" for key, line in (lines or {}).items()}
    for override in overrides:
        key, value = _split_override(override)
        _assign(data, key, value, override)
        places[key] = f"--set {override}"
    try:
        # JSON mode, because strict there still reads a path from text but never a number from true or "3".
        return section.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError(explain(error, section, places, origin), cure=cure) from error


def _split_override(override: str) -> tuple[str, Any]:
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        raise RecipeError(
            f"--set {override} is not of the form key=value.", cure="Example: --set train.lr=1e-4"
        )
    return key.strip(), parse_value(value, f"--set {override}")


def _assign(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    *sections, last = key.split(".")
    here = data
    for section in sections:
        inner = here.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(
                f"--set {override}: {section} holds the plain value {inner!r}, so it has no key {last}.",
                cure=f"Set {section} itself.",
            )
        here = inner
    here[last] = value
