"""What the pages say to type works as written: each command runs here, or says below why it cannot."""

import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support.clouds import free_port
from support.commands import Command
from support.edge_runs import byte_tokenizer, tiny_llama, write_jsonl
from support.pages import PAGES, ROOT, commands, mentions, options_of, parse, python_blocks
from tightbeam.edge.recipe import load_recipe
from tightbeam.federation.requirements import missing
from tightbeam.federation.scenario import load_scenario

ADDRESSES = re.compile(r"(localhost|cloud\.example\.org):50051")
# Commands that do not run here, by how they begin. What they name is looked at all the same.
REASONS = {
    "make ": "is what runs these tests, or needs a registry",
    "pip install ": "needs a registry",
    "python3.11 -m venv ": "needs a registry",
    "ruff format ": "is `make test` itself",
    "python benchmarks/": "takes minutes, or a device",
    "python docs/images/draw_step.py": "runs in tests/house/test_architecture.py",
    "tightbeam train recipes/first-run.yaml": "runs in tests/edge/training/test_recipes_run.py",
    "tightbeam compare ": "takes minutes; runs in tests/edge/comparison/test_compare.py",
    "tightbeam simulate ": "takes minutes; scenarios run in tests/simulations/test_scenarios_run.py",
    "tightbeam federate ": "needs a SuperLink; runs in tests/federation/runtimes/test_deployment.py",
    "python -m tightbeam.simulations.compose ": "runs in tests/simulations/test_compose_processes.py",
    "docker ": "needs a container engine; tests/deployment runs its page",
    "python -m tightbeam.common.health ": "needs a cloud; tests/deployment runs it",
    "flwr run ": "needs a SuperLink; federations run in tests/federation/runtimes/test_runtimes.py",
    "pytest ": "is what runs these tests",
    "tightbeam doctor HOST:PORT": "is short for what the front page has",
    "cp simulations/": "is for a command that does not run here",
}
PLACEHOLDERS = {
    "FILE": "notes.jsonl",
    "MODEL": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "RUN...": "runs/clinic",
}
# What a reader has done before a command, where the page does not say it.
BEFORE = {
    "tightbeam cache info": "tightbeam train recipes/top.yaml --set model.cloud=localhost:50051 "
    "--set model.insecure=false --set model.identity=certs/clinic --set data.train=notes.jsonl "
    "--set train.epochs=1"
}
# Python that does not run here, by what is in it; it is compiled.
FRAGMENTS = {
    "runs/federation/adapter": "needs a federation; tests/federation/server/test_global_adapter.py loads one",
    "runs/side/adapter": "needs a run of mode side; tests/edge/side/test_side.py loads one",
    "aggregator_named": "shows a call; tests/federation/math makes it",
    "SecAggServer(": "shows calls; tests/federation/secagg makes them",
}
ALL = list(dict.fromkeys(line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))))
EXCUSED = [line for line in ALL if line.startswith(tuple(REASONS))]
PARTS = ("cli", "cloud", "common", "edge", "federation", "simulations")
SOURCES = [path for part in PARTS for path in (ROOT / part).rglob("*.py")]

# PEFT 0.21 asks transformers 5.23 for a property under its former name; the Trainer pins memory without CUDA.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # it asks the hub
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


class Desk:
    """A folder with what a reader has at hand, and what runs there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"localhost:{free_port()}"
        self._serving: list[Command] = []
        shutil.copytree(ROOT / "recipes", folder / "recipes")
        model = folder / PLACEHOLDERS["MODEL"]
        tiny_llama(num_hidden_layers=18).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        rows = [{"prompt": f"{n} =", "completion": f"{n}" * (n % 3 + 1)} for n in range(24)]
        write_jsonl(folder / "notes.jsonl", rows)
        (folder / "public.txt").write_text("It was the best of times, it was the worst of times. " * 20)

    def type(self, line: str) -> None:
        """Run a command; one that serves is left running once it does."""
        assert line.startswith("tightbeam "), f"{line}: run it here, or say in REASONS why not"
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        words = [ADDRESSES.sub(self.address, word) for word in words]
        serves = words[0] == "serve"
        if serves:  # the page's port may be taken
            words += ["--listen", self.address.replace("localhost", "127.0.0.1")]
            self.close()
        environment = {"TIGHTBEAM_CACHE": str(self.folder / "weights")}
        command = Command(self.folder, *words, environment=environment)
        if serves:
            self._serving.append(command)
            command.wait_until(lambda: bool(command.out))
        else:
            done = command.wait()
            assert done.code == 0, f"{line}\n{done.err}"

    def close(self) -> None:
        while self._serving:
            self._serving.pop().kill()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.chdir(tmp_path)
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def test_everything_runs_as_written_in_the_order_of_the_pages(desk: Desk) -> None:
    names: dict[str, object] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in commands(text):
            if line not in EXCUSED:
                for before in (BEFORE[start] for start in BEFORE if line.startswith(start)):
                    desk.type(before)
                desk.type(line)
        for block in python_blocks(text):
            code = compile(ADDRESSES.sub(desk.address, block), page.name, "exec")
            if not any(part in block for part in FRAGMENTS):
                exec(code, names)
    exec("shortcut.remove(); cache.close()", names)  # as docs/modes.md says below its block
    whole = AutoModelForCausalLM.from_pretrained(PLACEHOLDERS["MODEL"])
    opened = PeftModel.from_pretrained(whole, desk.folder / "adapter")
    learned = [float(value.abs().sum()) for name, value in opened.named_parameters() if "lora_B" in name]
    assert len(learned) == 8 * 7  # the blocks at either end, and all projections in each
    assert min(learned) > 0


@pytest.mark.parametrize("line", [line for line in ALL if line.startswith("tightbeam ")])
def test_a_command_is_understood(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", EXCUSED)
def test_what_does_not_run_here_names_what_is_there(line: str) -> None:
    words = shlex.split(line, comments=True)
    for word in words:
        if re.fullmatch(r"(benchmarks|docs|recipes|simulations)/\S+|docker-compose\S*|.*\.txt", word):
            assert (ROOT / word).is_file(), word
    settings = [after for word, after in pairwise(words) if word == "--set"]
    if words[:2] == ["tightbeam", "simulate"] and words[2] == "topics.yaml":
        scenarios = ROOT / "simulations" / "tightbeam" / "simulations" / "scenarios"
        load_scenario(scenarios / words[2], settings)
    if words[:2] in (["tightbeam", "train"], ["tightbeam", "compare"]):
        load_recipe(ROOT / words[2], settings)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)


def test_no_excuse_without_a_command() -> None:
    assert [start for start in (*REASONS, *BEFORE) if not any(line.startswith(start) for line in ALL)] == []
    python = [block for page in PAGES for block in python_blocks(page.read_text(encoding="utf-8"))]
    assert [part for part in FRAGMENTS if not any(part in block for block in python)] == []


def test_what_is_mentioned_exists() -> None:
    found = {span for page in PAGES for span in mentions(page.read_text(encoding="utf-8"))}
    assert "tightbeam serve --prices FILE" in found
    for span in found:
        assert {word for word in span.split() if word.startswith("--")} <= options_of(span), span


@pytest.mark.parametrize(
    "line", ["tightbeam sreve", "tightbeam serve --modle x", "tightbeam report", "tightbeam certs init certs"]
)
def test_a_wrong_command_would_be_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


def cures() -> list[str]:
    """Commands of ours that stand in what the program prints."""
    return sorted(
        {
            found
            for path in SOURCES
            for found in re.findall(r"`(tightbeam [^`]+)`", path.read_text(encoding="utf-8"))
            if "|" not in found
        }
    )


@pytest.mark.parametrize("cure", cures())
def test_a_cure_is_a_command_with_options_that_it_has(cure: str) -> None:
    words = [re.sub(r"\{.*", "x", word) for word in cure.split()]
    assert {word for word in words if word.startswith("--")} <= options_of(" ".join(words))


@pytest.mark.parametrize("extra", ["demo", "privacy", "ray"])
def test_the_cure_for_a_missing_extra_names_packages_and_not_ours(extra: str) -> None:
    (text,) = re.findall(r"^Run `pip install \"(.+)\"`\.$", missing("x", extra).cure)
    assert Requirement(text).name in ("flwr", "gguf")
    assert not any('"tightbeam[' in path.read_text(encoding="utf-8") for path in [*SOURCES, *PAGES])
