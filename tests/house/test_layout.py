"""The house keeps its shape: namespace roots, py.typed, front doors, honest `__all__`, no unsafe loading."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HOUSE: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "house.py"))
PARTS: tuple[str, ...] = HOUSE["PARTS"]
UNSAFE = re.compile(
    r"^\s*(import|from) pickle\b|\btorch\.load\(|allow_pickle\s*=\s*True|\bpickle\.loads?\(", re.M
)
MODULES: list[Path] = [path for part in PARTS for path in HOUSE["sources"](part)]
# Files that are still too long, and names that still have two classes: both lists may only shrink.
LONG: set[str] = set()
TWICE = {
    "AdapterSection",
    "Budget",
    "Costs",
    "DataSection",
    "Exchange",
    "Job",
    "Message",
    "OutputSection",
    "Plan",
    "Scope",
    "TrainSection",
    "_Model",
}


def dotted(path: Path) -> str:
    inside = path.relative_to(ROOT).parts[1:]
    return ".".join(inside).removesuffix(".py").removesuffix(".__init__")


def stray_inits(root: Path) -> list[Path]:
    """Files that would make `tightbeam` an ordinary package of one part and hide the others."""
    return [
        path
        for part in PARTS
        for path in (root / part / "__init__.py", root / part / "tightbeam" / "__init__.py")
        if path.exists()
    ]


def all_of(source: str) -> list[str] | None:
    """The names in `__all__`, read from the source; None without one."""
    for node in ast.parse(source).body:
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, ast.AnnAssign)
            else None
        )
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "__all__" and value is not None:
            names = ast.literal_eval(value)
            return [str(name) for name in names]
    return None


def complaints(source: str) -> list[str]:
    """What is wrong with a module's `__all__`: missing, unbound names, definitions left out (ruff sorts)."""
    names = all_of(source)
    if names is None:
        return ["no __all__"]
    body = ast.parse(source).body
    defined = {
        node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }
    bound = defined | {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    bound |= {
        t.id for node in body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    }
    bound |= {
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    found = [f"{name} does not exist" for name in names if name not in bound]
    return found + [
        f"{name} is not listed" for name in sorted(defined) if not name.startswith("_") and name not in names
    ]


def test_no_stray_init_at_a_namespace_root() -> None:
    assert stray_inits(ROOT) == []


def test_a_stray_init_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "edge" / "tightbeam").mkdir(parents=True)
    stray = tmp_path / "edge" / "tightbeam" / "__init__.py"
    stray.touch()
    assert stray_inits(tmp_path) == [stray]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_typed_and_has_a_front_door(part: str) -> None:
    folder = ROOT / part / "tightbeam" / part
    assert (folder / "py.typed").is_file()
    front_door = importlib.import_module(f"tightbeam.{part}")
    assert front_door.__doc__, f"tightbeam.{part} does not say what it is for"
    for name in getattr(front_door, "__all__", []):
        assert hasattr(front_door, name), f"tightbeam.{part}.__all__ lists {name}, which does not exist"


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_module_says_what_it_is_for_and_lists_its_names(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), f"{module} has no docstring"
    if module.name == "__init__.py" and not ast.parse(source).body[1:]:
        return  # a front door with nothing behind it but submodules
    assert complaints(source) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def f(): ...", "no __all__"),
        ("__all__ = ['a']", "a does not exist"),
        ("__all__ = []\nclass A: ...", "A is not listed"),
    ],
)
def test_a_dishonest_all_would_be_seen(source: str, complaint: str) -> None:
    assert complaint in complaints(source)


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_no_unsafe_loading(module: Path) -> None:
    assert not UNSAFE.search(module.read_text(encoding="utf-8")), f"{module} can run code out of a file"


@pytest.mark.parametrize(
    "line", ["import pickle", "x = torch.load(p)", "np.load(p, allow_pickle=True)", "pickle.loads(b)"]
)
def test_unsafe_loading_would_be_seen(line: str) -> None:
    assert UNSAFE.search(line)


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(path.relative_to(ROOT)) for path in MODULES if HOUSE["lines_of"](path) > 400}
    assert long <= LONG, "split it by what it does"
    assert long == LONG, "well done: take it out of LONG"


def test_no_two_classes_share_a_name() -> None:
    twice = HOUSE["shared_names"](MODULES)
    assert set(twice) <= TWICE, {name: twice[name] for name in set(twice) - TWICE}
    assert set(twice) == TWICE, "well done: take it out of TWICE"


def test_a_second_class_of_a_name_would_be_seen(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(f"class {name}:\n    class Plan: ...")
    assert set(HOUSE["shared_names"](sorted(tmp_path.iterdir()))) == {"Plan"}


def test_the_edge_does_not_import_the_cloud() -> None:
    """import-linter checks all arrows statically; this is the one that also must hold when it runs."""
    code = "import sys, tightbeam.edge; print([m for m in sys.modules if m.startswith('tightbeam.cloud')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
