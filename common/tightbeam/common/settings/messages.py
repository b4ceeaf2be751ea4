"""Pydantic's complaints about a file in plain words: the dotted key, where it stands, what was expected.

An unknown key comes with the nearest known one, searched in its own section first and then everywhere, so
that `lr` at the top level points to `train.lr`.
"""

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

__all__ = ["did_you_mean", "explain", "known_keys"]

_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "path": "a path",
    "dict": "keys and values",
    "list": "a list",
    "model": "keys and values",
}


def did_you_mean(word: str, known: list[str]) -> str:
    """` Did you mean x?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all keys of a model, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def explain(error: ValidationError, model: type[BaseModel], places: Mapping[str, str], origin: str) -> str:
    """One line per problem; `places` maps dotted keys to `file:line` or the flag that set them."""
    keys = known_keys(model)
    problems: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors():
        problems.setdefault(_dotted(problem["loc"], keys), []).append(problem)
    missing = [path for path, found in problems.items() if found[0]["type"] == "missing"]
    missing_last = sorted(problems.items(), key=lambda item: item[0] in missing)
    return "\n".join(
        f"{_place(path, places, origin)}: {_sentence(found, path, keys, missing)}"
        for path, found in missing_last
    )


def _dotted(loc: tuple[int | str, ...], keys: list[str]) -> str:
    """Keep what is a key or the unknown tail; pydantic also names the branch of a union."""
    parts: list[str] = []
    for part in loc:
        candidate = ".".join([*parts, str(part)])
        if candidate in keys or not any(key == ".".join(parts) for key in keys) or _is_section(parts, keys):
            parts.append(str(part))
    return ".".join(parts)


def _is_section(parts: list[str], keys: list[str]) -> bool:
    prefix = ".".join(parts) + "."
    return any(key.startswith(prefix) for key in keys)


def _place(path: str, places: Mapping[str, str], origin: str) -> str:
    """Where the key stands, or else what is in it, or else the nearest section around it."""
    inside = [place for key, place in places.items() if key.startswith(f"{path}.")]
    if path and path not in places and inside:
        return inside[-1]
    while path:
        if path in places:
            return places[path]
        path = path.rpartition(".")[0]
    return origin


def _sentence(problems: list[ErrorDetails], path: str, keys: list[str], missing: list[str]) -> str:
    """Several problems with one key are the branches of a union: any of them would have done."""
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key {path}.{_nearest_key(path, keys, missing)}"
    if first["type"] == "missing":
        return f"{path} is missing."
    if first["type"] == "value_error":
        return f"{path or 'the file'} is refused: {first['ctx']['error']}."
    expected = " or ".join(dict.fromkeys(_expected(problem, path) for problem in problems))
    return f"{path or 'the file'} should be {expected}, not {_shown(first['input'])}."


def _nearest_key(path: str, keys: list[str], missing: list[str]) -> str:
    if near := difflib.get_close_matches(path, missing, n=1):
        return f" Did you mean {near[0]}?"
    section, _, leaf = path.rpartition(".")
    siblings = [key for key in keys if key.rpartition(".")[0] == section]
    by_leaf = {key.rpartition(".")[2]: key for key in [*keys, *siblings]}
    near_sibling = difflib.get_close_matches(leaf, [key.rpartition(".")[2] for key in siblings], n=1)
    near = near_sibling or difflib.get_close_matches(leaf, list(by_leaf), n=1)
    return f" Did you mean {by_leaf[near[0]]}?" if near else f" Known here: {', '.join(sorted(siblings))}."


_LOOKS = {
    "model.fingerprint": "64 hexadecimal digits, as `tightbeam doctor` shows them",
    "cut": "k:m, for example 4:4",
    "output.name": "letters, digits, dot, dash and underscore",
}
_LIMITS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def _expected(problem: ErrorDetails, path: str) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    stem = kind.split("_")[0]
    if stem == "string":
        return _LOOKS.get(path) or _LOOKS.get(path.rpartition(".")[2], "text")
    if kind == "literal_error":
        return str(context["expected"])
    for name, words in _LIMITS.items():
        if name in context:
            return f"{words} {context[name]:g}"
    return _WANTED.get(stem, problem["msg"])


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict) else "{" + ", ".join(map(str, value)) + "}"
    return text if len(text) <= 60 else text[:57] + "..."
