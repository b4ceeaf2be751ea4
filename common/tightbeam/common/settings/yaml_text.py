"""YAML as people expect it, with the line of every key.

PyYAML follows YAML 1.1, where `cut: 4:4` is the number 244 (base sixty), `1e-4` is a string, `no` is false
and `2026-01-01` a date. This loader resolves the core types of YAML 1.2 only, and refuses a key given twice.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tightbeam.common.errors import RecipeError, reason

__all__ = ["key_lines", "parse_mapping", "parse_value", "read_mapping"]


class _Loader(yaml.SafeLoader):
    """Core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own shape

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the parent's, but a key given twice is an error with its line."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_RESOLVERS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(
        _tag, re.compile(rf"^(?:{_pattern})$"), ["" if char == "\0" else char for char in _first]
    )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


def read_mapping(path: str | Path, what: str, examples: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Keys and values of a file, and the line of each dotted key; `what` is what it should be.

    Raises:
        RecipeError: it cannot be read, is no YAML, or has no keys; `examples` says where such files are.

    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"Cannot read the {what} {path}: {reason(error)}.", cure="Give the path of a YAML file."
        ) from error
    return parse_mapping(text, str(path), examples), key_lines(text)


def parse_mapping(text: str, origin: str, examples: str = "recipes/") -> dict[str, Any]:
    """Parse a file whose top level is keys and values; `origin` names it in errors."""
    data = _parse(text, origin)
    if not isinstance(data, dict):
        shown = "is empty" if data is None else f"holds {type(data).__name__} at its top level"
        raise RecipeError(
            f"{origin} {shown}, not keys and values.", cure=f"Start from one of the files in {examples}."
        )
    return data


def parse_value(text: str, origin: str) -> Any:
    """Parse one value of the command line by the file's rules; `origin` names it in errors."""
    return _parse(text, origin)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(
            f"{origin}{line} is not valid YAML: {error.problem}.",
            cure="Check indentation, colons and quotes there.",
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{origin} is not valid YAML: {' '.join(str(error).split())}.",
            cure="Save it as plain UTF-8 text.",
        ) from error


def key_lines(text: str) -> dict[str, int]:
    """Line (from 1) of every dotted key of a valid document."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                path = f"{prefix}{key.value}"
                lines[path] = key.start_mark.line + 1
                walk(value, f"{path}.")

    walk(yaml.compose(text, Loader=_Loader), "")
    return lines
