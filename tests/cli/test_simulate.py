"""`tightbeam simulate` as people meet it: one line per error, the cure, the exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import run_command
from support.federations import Playground
from tightbeam.common.errors import UsageError
from tightbeam.common.locks import FolderLock
from tightbeam.simulations.experiment import run_scenario

TEXT = "clients: 2\nrounds: 1\ndata: {source: rows.jsonl}\ncloud: {address: 'localhost:9', insecure: true}\n"


def _simulate_elsewhere(startup: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command; `startup` is code that its Python runs first, to stand for another installation."""
    (folder / "s.yaml").write_text(TEXT, encoding="utf-8")
    (folder / "startup").mkdir()
    (folder / "startup" / "sitecustomize.py").write_text(startup, encoding="utf-8")
    command = [sys.executable, "-m", "tightbeam.cli", "simulate", "s.yaml", *words]
    paths = [str(folder / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, check=False, timeout=240, env=env
    )


@pytest.mark.parametrize(
    ("text", "words", "code", "said"),
    [
        (TEXT.replace("rounds", "roundz"), (), 2, "s.yaml:2: unknown key roundz. Did you mean rounds?"),
        (TEXT, ("--set", "sample=3"), 2, "sample is 3, but there are 2 clients"),
        (TEXT.replace("insecure: true", "insecure: false"), (), 2, "Set cloud.identities"),
        (TEXT, ("--set", "clients=40"), 2, "Lower clients or partition.min_examples"),
        (TEXT, ("--set", "data.source=none.jsonl"), 2, "Cannot read the data file none.jsonl"),
        (TEXT, ("--runtime", "rai"), 2, "is not one of"),
        (TEXT, ("--resume",), 2, "holds no experiment to resume"),
    ],
    ids=[
        "typo",
        "sample",
        "no-identities",
        "impossible",
        "no-data",
        "runtime",
        "nothing-to-resume",
    ],
)
def test_an_error_is_one_line_with_its_cure(
    tmp_path: Path, playground: Playground, text: str, words: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(playground.data.read_bytes())
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    done = run_command(tmp_path, "simulate", "s.yaml", *words)
    assert (done.code, done.out) == (code, ""), done.err
    assert said in done.err
    assert "Traceback" not in done.err


def test_an_experiment_that_is_at_work_is_left_alone(playground: Playground) -> None:
    scenario = playground.scenario()
    with FolderLock(scenario.folder, what="The experiment", cure="Wait."):
        for resume in (False, True):
            with pytest.raises(UsageError, match=f"in use by process {os.getpid()} on "):
                run_scenario(scenario, resume=resume)


def test_an_unreachable_cloud_has_its_own_code(tmp_path: Path, playground: Playground) -> None:
    (tmp_path / "rows.jsonl").write_bytes(playground.data.read_bytes())
    (tmp_path / "s.yaml").write_text(TEXT, encoding="utf-8")
    done = run_command(tmp_path, "simulate", "s.yaml")
    assert done.code == 6
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "Check that `tightbeam serve` runs there" in done.err.splitlines()[-1]


_OTHER_FLOWER = """
from importlib import metadata
found = metadata.version
metadata.version = lambda name: "1.44.0" if name == "flwr" else found(name)
"""
_NO_RAY = """
import sys
from importlib import util
found = util.find_spec
util.find_spec = lambda name, package=None: None if name == "ray" else found(name, package)
sys.modules["ray"] = None
"""


@pytest.mark.parametrize(
    ("startup", "words", "said"),
    [
        (_OTHER_FLOWER, (), 'error: flwr 1.44.0 is installed. Run `pip install "flwr>=1.41,<1.43"`.'),
        (
            _NO_RAY,
            ("--runtime", "ray"),
            'error: The Ray runtime needs the package ray. Run `pip install "flwr[simulation]<1.43,>=1.41"`.',
        ),
    ],
    ids=["flower", "ray"],
)
def test_another_installation_is_told_with_the_command_to_type(
    tmp_path: Path, playground: Playground, startup: str, words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(playground.data.read_bytes())
    done = _simulate_elsewhere(startup, tmp_path, *words)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [said])
    assert not (tmp_path / "runs").exists(), "nothing was begun"
