"""What a model's config may ask for: one that a peer sent runs no code, and takes no memory without bound."""

import re
from collections.abc import Mapping
from typing import Any

from tightbeam.common.errors import UnsupportedModelError

__all__ = ["MAX_BLOCKS", "MAX_WIDTH", "judged_config"]

MAX_BLOCKS = 1024
MAX_WIDTH = 1 << 17
_MOST = (  # by what a key's name ends in; the first that fits
    (re.compile(r"layers?$"), MAX_BLOCKS),
    (re.compile(r"(hidden_size|n_embd|d_model|head_dim)$"), MAX_WIDTH),
    (re.compile(r"(heads?|experts)$"), 4096),
    (re.compile(r"theta$"), 1 << 40),
    (re.compile(r""), 1 << 26),
)
_CODE = {"auto_map", "custom_pipelines", "attn_implementation", "experts_implementation"}  # may name code


def judged_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what could name code to run; `UnsupportedModelError` for numbers out of bounds."""
    _judge(values)
    return {name: value for name, value in values.items() if name not in _CODE and not name.startswith("_")}


def _judge(value: Any, name: str = "") -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _judge(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            _judge(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = next(most for pattern, most in _MOST if pattern.search(name))
        if abs(value) > most:
            raise UnsupportedModelError(
                f"The model's config asks for {name} {value}; {most} is the most.",
                cure="If it is right, tell us; if the config came from a cloud, do not use that cloud.",
            )
