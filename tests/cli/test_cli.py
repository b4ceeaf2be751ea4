"""The command line as people meet it: quick, light, one line per error, the answer on stdout."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.commands import run_command
from tightbeam.cli.options import require_loopback
from tightbeam.common.errors import UsageError
from tightbeam.edge.recipe import Recipe

RECIPE = """
model: {cloud: "localhost:50051", insecure: true}
cut: "4:4"
data: {train: texts.jsonl}
train: {steps: 5}
output: {name: first}
"""
HEAVY = ("torch", "flwr", "transformers", "matplotlib", "grpc", "numpy", "peft", "sqlalchemy")


def tightbeam(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tightbeam.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=os.environ | env, check=False, timeout=120
    )


def heavy_modules(code: str) -> list[str]:
    """Run code in a fresh interpreter and tell which heavy packages it has imported."""
    report = f"import sys, json; {code}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_help_comes_in_half_a_second() -> None:
    walls_s = []
    for _ in range(3):
        started_s = time.perf_counter()
        assert tightbeam("--help").returncode == 0
        walls_s.append(time.perf_counter() - started_s)
    assert min(walls_s) < 0.5


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    assert heavy_modules("import tightbeam.cli") == []


def test_a_heavy_import_would_be_seen() -> None:
    assert heavy_modules("import numpy") == ["numpy"]


def test_help_names_every_command() -> None:
    text = tightbeam("--help").stdout
    names = ("serve", "train", "data", "doctor", "report", "certs", "demo", "config", "usage", "federate")
    assert [name for name in names if f"\n  {name} " not in text] == []


@pytest.mark.parametrize(
    "words",
    [
        ["serve"],
        ["train"],
        ["data", "check"],
        ["doctor"],
        ["report"],
        ["certs", "init"],
        ["demo"],
        ["usage"],
        ["certs", "federation"],
        ["federate", "run"],
        ["federate", "register"],
    ],
    ids=" ".join,
)
def test_every_command_explains_itself(words: list[str]) -> None:
    done = tightbeam(*words, "--help")
    assert done.returncode == 0
    assert f"Usage: tightbeam {' '.join(words)}" in done.stdout


def test_version_is_the_answer() -> None:
    assert tightbeam("--version").stdout.split() == ["tightbeam", "0.1.0"]


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [(["sreve"], "Did you mean 'serve'?"), (["serve", "--modle", "x"], "Did you mean '--model'?")],
)
def test_a_misspelt_word_is_answered_with_the_right_one(words: list[str], suggestion: str) -> None:
    done = tightbeam(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert suggestion in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_one_line_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(RECIPE.replace("steps", "stepz"), encoding="utf-8")
    done = tightbeam("config", "check", "bad.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "train.steps" in done.stderr or "steps" in done.stderr


def test_help_says_what_the_arguments_are() -> None:
    lines = tightbeam("report", "--help").stdout.splitlines()
    assert "  RUN...  Run folders.  [required]" in lines


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["data", "check", "nope.jsonl", "--model", "a hub id that cannot be fetched"], "nope.jsonl"),
        (["demo", "--data", "nope.jsonl"], "The demo has two edges, not 1"),
    ],
)
def test_what_the_user_gave_is_looked_at_before_anything_is_fetched(words: list[str], first: str) -> None:
    done = tightbeam(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert first in done.stderr.splitlines()[0]


def test_an_unknown_key_comes_before_the_keys_that_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(RECIPE.replace("model", "modle"), encoding="utf-8")
    told = tightbeam("config", "check", "bad.yaml", cwd=tmp_path).stderr
    assert told.startswith("error: bad.yaml:2: unknown key modle. Did you mean model? ")
    assert "model is missing" in told


def test_a_debugging_developer_gets_the_traceback(tmp_path: Path) -> None:
    done = tightbeam("config", "check", "missing.yaml", cwd=tmp_path, TIGHTBEAM_DEBUG="1")
    assert "Traceback" in done.stderr
    assert "RecipeError" in done.stderr


def test_an_identity_that_is_missing_has_its_own_exit_code(tmp_path: Path) -> None:
    done = tightbeam(
        "serve", "--model", "x", "--identity", "nowhere", "--listen", "127.0.0.1:0", cwd=tmp_path
    )
    assert done.returncode == 3
    assert "tightbeam certs init" in done.stderr.splitlines()[-1]


def test_train_tells_a_wrong_recipe_before_it_loads_anything(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    done = tightbeam("train", "recipe.yaml", "--set", "train.learning=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "train.learning" in done.stderr


def test_config_check_prints_the_resolved_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    done = run_command(tmp_path, "config", "check", "recipe.yaml", "--set", "train.lr=0.5")
    assert done.code == 0
    assert "lr: 0.5" in done.out
    assert "runs/first" in done.err.replace("\\", "/")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("adapter.method=lorra", "adapter.method lorra is not known to PEFT"),
        ("adapter.method=prefix_tuning", "adapter.method prefix_tuning cannot be trained here"),
        (
            "adapter.extra={use_dorra: true}",
            "adapter.extra.use_dorra is no argument of LoraConfig.",
        ),
        ("codec=int3", "should be 'auto', 'fp32', 'bf16',"),
        ("cut=0:0", "leaves no block at the edge"),
        ("model.cloud=http://cloud.example:50051", "is not host:port"),
    ],
)
def test_config_check_refuses_what_train_would(tmp_path: Path, setting: str, told: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    done = run_command(tmp_path, "config", "check", "recipe.yaml", "--set", setting)
    assert (done.code, done.out) == (2, "")
    assert told in done.error


def test_config_schema_is_the_recipes() -> None:
    assert json.loads(tightbeam("config", "schema").stdout) == Recipe.model_json_schema()


def test_certs_init_prints_what_it_made_and_keeps_what_was_there(tmp_path: Path) -> None:
    first = tightbeam("certs", "init", "certs", "--client", "clinic", cwd=tmp_path)
    assert [Path(line).name for line in first.stdout.splitlines()] == ["ca", "cloud", "clinic"]
    again = tightbeam("certs", "init", "certs", "--client", "clinic", "--client", "lab", cwd=tmp_path)
    assert [Path(line).name for line in again.stdout.splitlines()] == ["lab"]
    assert again.stderr.count("kept") == 3


def test_certs_init_refuses_a_name_that_is_a_path(tmp_path: Path) -> None:
    done = tightbeam("certs", "init", "certs", "--client", "../ca", cwd=tmp_path)
    assert done.returncode == 3
    assert not (tmp_path / "ca").exists()


def test_data_check_wants_one_source_of_the_tokenizer(tmp_path: Path) -> None:
    done = tightbeam("data", "check", "x.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "--model or --cloud" in done.stderr


def test_report_of_no_run_is_an_error_with_a_cure(tmp_path: Path) -> None:
    done = tightbeam("report", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "tightbeam train" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1"])
def test_insecure_is_allowed_on_loopback_and_loud(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    require_loopback(address, None)
    assert capsys.readouterr().err.startswith("WARNING: --insecure")


@pytest.mark.parametrize("address", ["0.0.0.0:1", "10.0.0.1:1", "[::]:1", "localhost.evil.example:1", ":1"])
def test_insecure_is_refused_elsewhere(address: str) -> None:
    with pytest.raises(UsageError, match="not a loopback address"):
        require_loopback(address, None)


def test_insecure_and_an_identity_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude"):
        require_loopback("127.0.0.1:1", Path("certs/cloud"))
