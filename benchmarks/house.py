"""Prints the measures of the house: lines per part, longest files, class names that occur twice.

Source is what is written by hand and installed: no generated code, no tests, no benchmarks. Lines are those
of the files, blank ones and comments too.
"""

import ast
import statistics
from collections import defaultdict
from pathlib import Path

__all__ = ["PARTS", "ROOT", "classes", "lines_of", "main", "shared_names", "sources"]

ROOT = Path(__file__).parents[1]
PARTS = ("cli", "cloud", "common", "edge", "federation", "proto", "simulations")


def sources(part: str) -> list[Path]:
    """A part's modules."""
    found = sorted((ROOT / part / "tightbeam" / part).rglob("*.py"))
    return [path for path in found if "_pb2" not in path.name]


def lines_of(path: Path) -> int:
    """How long a file is."""
    return len(path.read_text(encoding="utf-8").splitlines())


def classes(source: str) -> list[str]:
    """The classes that a module defines, private and nested ones too."""
    return [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


def shared_names(modules: list[Path]) -> dict[str, list[Path]]:
    """Class names that occur more than once, and where."""
    homes = defaultdict[str, list[Path]](list)
    for path in modules:
        for name in classes(path.read_text(encoding="utf-8")):
            homes[name].append(path)
    return {name: paths for name, paths in sorted(homes.items()) if len(paths) > 1}


def _row(name: str, modules: list[Path]) -> str:
    lengths = {path: lines_of(path) for path in modules}
    longest = max(modules, key=lambda path: lengths[path])
    median = statistics.median(lengths.values())
    where = longest.relative_to(ROOT)
    return f"{name:12}{len(modules):6}{sum(lengths.values()):8,}{median:8.0f}{lengths[longest]:9}  {where}"


def main() -> None:
    """Measure and print."""
    source = [path for part in PARTS for path in sources(part)]
    tests = sorted((ROOT / "tests").rglob("*.py"))
    print(f"{'part':12}{'files':>6}{'lines':>8}{'median':>8}{'longest':>9}")
    for part in PARTS:
        print(_row(part, sources(part)))
    print(_row("all source", source))
    print(_row("tests", tests))
    of_source = sum(map(lines_of, tests)) / sum(map(lines_of, source))
    print(f"\nLines of tests per line of source: {of_source:.2f}")
    twice = shared_names(source)
    print(f"Class names that occur more than once: {len(twice)}")
    for name, paths in twice.items():
        print(f"  {name}: {', '.join(str(path.relative_to(ROOT)) for path in paths)}")


if __name__ == "__main__":
    main()
