"""`tightbeam simulate` as people meet it: one line per error, the cure, the exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.federations import Playground
from tightbeam.simulations.experiment import require_flower

TEXT = "clients: 2\nrounds: 1\ndata: {source: rows.jsonl}\ncloud: {address: 'localhost:9', insecure: true}\n"


def _simulate(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "tightbeam.cli", "simulate", "s.yaml", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, timeout=240)


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
    ids=["typo", "sample", "no-identities", "impossible", "no-data", "runtime", "nothing-to-resume"],
)
def test_an_error_is_one_line_with_its_cure(
    tmp_path: Path, playground: Playground, text: str, words: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(playground.data.read_bytes())
    done = _simulate(tmp_path, text, *words)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_cloud_has_its_own_code(tmp_path: Path, playground: Playground) -> None:
    (tmp_path / "rows.jsonl").write_bytes(playground.data.read_bytes())
    done = _simulate(tmp_path, TEXT)
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Check that `tightbeam serve` runs there" in done.stderr.splitlines()[-1]


def test_another_flower_is_refused_with_the_command_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    require_flower()
    monkeypatch.setattr(metadata, "version", lambda name: "1.44.0")
    with pytest.raises(
        Exception, match=r'flwr 1\.44\.0 is installed\. Run `pip install "flwr>=1\.41,<1\.43"`'
    ):
        require_flower()
