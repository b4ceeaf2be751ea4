"""A `TightbeamError` in the details of a gRPC status, and back."""

import re

from tightbeam.common.errors import TightbeamError, error_from_code

__all__ = ["error_from_details", "status_details"]


def status_details(error: TightbeamError) -> str:
    """`"[code] message | cure"`, readable with any gRPC tool."""
    return f"[{error.code}] {error.message} | {error.cure}"


def error_from_details(details: str) -> TightbeamError | None:
    """The error that `status_details` wrote; None for other texts."""
    match = re.fullmatch(r"\[(\w+)\] (.*) \| (.*)", details, re.DOTALL)
    return None if match is None else error_from_code(match[1], match[2], match[3])
