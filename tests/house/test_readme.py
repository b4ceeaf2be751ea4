"""README.md keeps its word: its commands exist, its Python runs, its links and pictures are there."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import click
import pytest
import torch
import typer
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support.clouds import CloudProcess
from support.edge_runs import byte_tokenizer, tiny_llama
from tightbeam.cli.app import app
from tightbeam.common.authority import init_certificates
from tightbeam.common.config import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
COMMANDS = re.findall(r"^    (tightbeam .+)$", README, flags=re.M)


def parse(command: str) -> None:
    """Read a command line as the command itself would, and do not run it; raises `click.UsageError`."""
    words = shlex.split(command, comments=True)[1:]
    group = typer.main.get_command(app)
    context = click.Context(group, info_name="tightbeam")
    while isinstance(group, click.Group):
        _, found, words = group.resolve_command(context, words)
        assert found is not None
        group = found
    group.make_context(group.name, words, parent=context)


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))


def broken_links(page: Path) -> list[str]:
    """Relative links and pictures of a page that lead nowhere."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [to for to in targets if "://" not in to and not (page.parent / to).exists()]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_the_tool_understands(command: str) -> None:
    parse(command)


@pytest.mark.parametrize(
    "command",
    ["tightbeam sreve", "tightbeam serve --modle x", "tightbeam report", "tightbeam certs init certs"],
)
def test_a_wrong_command_would_be_found(command: str) -> None:
    with pytest.raises(click.UsageError):
        parse(command)


def test_the_recipe_takes_the_settings_that_stand_beside_it() -> None:
    (line,) = (shlex.split(line) for line in COMMANDS if line.startswith("tightbeam train"))
    load_recipe(ROOT / line[2], [after for word, after in pairwise(line) if word == "--set"])


def test_make_has_the_targets() -> None:
    named = set(re.findall(r"\bmake ([a-z][\w-]*)\b +#", README))
    assert named == {"demo", "test"}
    assert named <= make_targets()
    assert "no-such-target" not in make_targets()


def test_every_result_names_what_prints_it() -> None:
    table = README.partition("## Measured")[2].partition("## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 4
    for _, result, source in rows:
        assert re.search(r"\d", result)
        name = source.strip().strip("`")
        assert (ROOT / name.split()[0]).is_file() or name.removeprefix("make ") in make_targets(), name


def test_what_the_cloud_can_see_is_said_in_bold_here_and_in_the_security_page() -> None:
    bold = [re.findall(r"\*\*(The worker .+?)\*\*", page.read_text(), flags=re.S) for page in PAGES[:2]]
    here, there = (" ".join(found[0].split()) for found in bold)
    assert here == there
    assert "not from the worker's operator" in here


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("[a](b.md) ![c](page.md) [d](https://example.org) [e](page.md#top)")
    assert broken_links(tmp_path / "page.md") == ["b.md"]


def test_every_page_is_on_the_list_of_pages() -> None:
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in listed} == set()


def test_the_screenshot_is_light_to_load() -> None:
    picture = ROOT / "docs" / "images" / "report.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 300_000


# PEFT 0.21 asks transformers 5.23 for a property under its former name; the Trainer pins memory without CUDA.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_python_trains_against_a_real_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"^```python\n(.+?)^```", README, flags=re.M | re.S)
    model = tmp_path / "model"
    tiny_llama(num_hidden_layers=10).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    init_certificates(tmp_path / "certs", clients=["clinic"])
    ids = [torch.tensor([3, 5, 8, 13, number]) for number in range(21, 24)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "cache"))
    with CloudProcess(model, tmp_path, "--identity", str(tmp_path / "certs" / "cloud")) as cloud:
        names = {"dataset": [{"input_ids": row, "labels": row} for row in ids]}
        exec(compile(source.replace("localhost:50051", cloud.address), "README.md", "exec"), names)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    learned = [float(value.abs().sum()) for name, value in whole.named_parameters() if "lora_B" in name]
    assert len(learned) == 8 * 7  # the blocks at either end, and all projections in each
    assert min(learned) > 0
