"""What the pages tell people to type: commands and Python, as they stand there."""

import re
import shlex
from pathlib import Path

import click
import typer

from tightbeam.cli.app import app

__all__ = ["PAGES", "ROOT", "commands", "mentions", "options_of", "parse", "python_blocks"]

ROOT = Path(__file__).parents[2]
_FRONT = ("README.md", "SECURITY.md", "CONTRIBUTING.md")
PAGES = [*(ROOT / name for name in _FRONT), *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAMS = r"(?:tightbeam|make|python3?(?:\.\d+)?|pip|flwr|cp|ruff|pytest|docker) "
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```\n", flags=re.M | re.S)


def commands(text: str) -> list[str]:
    """Lines of blocks that begin with a program, and `code` in sentences that is a whole command."""
    text = _FENCED.sub("", text)
    blocks = re.findall(rf"^    ({_PROGRAMS}.+)$", text, flags=re.M)
    return [*blocks, *(span for span in _spans(text) if _is_whole(span))]


def mentions(text: str) -> list[str]:
    """`tightbeam ...` in sentences that names a command, or an option of it, and is no whole command."""
    spans = _spans(_FENCED.sub("", text))
    return [span for span in spans if span.startswith("tightbeam ") and not _is_whole(span)]


def python_blocks(text: str) -> list[str]:
    """Fenced blocks of Python, and indented ones whose first line can only be Python."""
    fenced = [block for language, block in _FENCED.findall(text) if language == "python"]
    indented = re.findall(r"(?:^    .*\n(?:\n(?=    ))*)+", _FENCED.sub("", text), flags=re.M)
    plain = [re.sub(r"^    ", "", block, flags=re.M) for block in indented]
    return [*fenced, *(block for block in plain if block.startswith(("import ", "from ")) or _is_call(block))]


def _is_call(block: str) -> bool:
    """Whether a block begins with a call whose result gets a name, and is no formula."""
    try:
        compile(block, "page", "exec")
    except SyntaxError:
        return False
    return re.match(r"\w[\w.]* = \w[\w.]*\(", block) is not None


def _spans(text: str) -> list[str]:
    sentences = re.sub(r"\s+", " ", re.sub(r"^    .*$", "", text, flags=re.M))
    found: list[str] = re.findall(rf"`({_PROGRAMS}[^`]+)`", sentences)
    return found


def _is_whole(span: str) -> bool:
    if not span.startswith("tightbeam "):
        return span != "flwr run"
    try:
        parse(span)
    except click.UsageError:
        return False
    return span.count(" ") > 1


def parse(command: str) -> None:
    """Read a command line as the command itself would, and do not run it; raises `click.UsageError`."""
    words = shlex.split(command, comments=True)[1:]
    context, group, words = _command(words)
    group.make_context(group.name, words, parent=context)


def options_of(command: str) -> set[str]:
    """The options that a command of `tightbeam` has; raises `click.UsageError` for one that is none."""
    _, found, _ = _command(shlex.split(command)[1:])
    return {name for parameter in found.params for name in parameter.opts}


def _command(words: list[str]) -> tuple[click.Context, click.Command, list[str]]:
    group: click.Command = typer.main.get_command(app)
    context = click.Context(group, info_name="tightbeam")
    while isinstance(group, click.Group) and words:
        _, found, words = group.resolve_command(context, words)
        assert found is not None
        group = found
    return context, group, words
