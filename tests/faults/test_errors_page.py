"""docs/errors.md names every error class with the code, status, exit code and patience that it has."""

import re
from pathlib import Path

import grpc

from tightbeam.common.errors import TightbeamError, UnknownStepError, error_from_code
from tightbeam.common.wire.status import error_from_details, status_details

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
ROW = re.compile(r"\| `(\w+Error)` \| `(\w+)` \| (\w+) \| (\d+) \| ([^|]+) \| ([^|]+) \|")
MEANING = re.compile(r"^\| (\d+) \| (.+) \| .* \|$", re.MULTILINE)


def tree(root: type[TightbeamError]) -> list[type[TightbeamError]]:
    ours = [child for child in root.__subclasses__() if child.__module__ == root.__module__]
    return [root, *(leaf for child in ours for leaf in tree(child))]


def test_the_page_has_every_class_as_it_is() -> None:
    told = {row[1]: row for row in ROW.finditer(PAGE.read_text(encoding="utf-8"))}
    assert told.keys() == {error.__name__ for error in tree(TightbeamError)}
    for error in tree(TightbeamError):
        code, status, exit_code, retried = told[error.__name__].group(2, 3, 4, 5)
        assert (code, status, int(exit_code)) == (error.code, error.status, error.exit_code), error
        assert (retried == "yes") == error.transient, error


def test_every_exit_code_has_a_meaning() -> None:
    meanings = {int(row[1]) for row in MEANING.finditer(PAGE.read_text(encoding="utf-8"))}
    assert meanings == {0, 130, *(error.exit_code for error in tree(TightbeamError))}


def test_an_error_crosses_the_wire_as_what_it_is() -> None:
    for error in tree(TightbeamError):
        assert error.status in grpc.StatusCode.__members__
        crossed = error_from_details(status_details(error("What happened.", cure="What to do.")))
        assert type(crossed) is error
        assert str(crossed) == "What happened. What to do."
    assert type(error_from_code("of a later version", "text")) is TightbeamError
    assert isinstance(error_from_code("unknown_step", "text"), UnknownStepError)
