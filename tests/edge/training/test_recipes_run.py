"""Every recipe in recipes/, run in small against a real cloud process with a tiny model of 18 blocks."""

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.commands import Cloud
from support.edge_runs import byte_tokenizer, quiet, tiny_llama, write_jsonl
from tightbeam.edge.recipe import Recipe, load_recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.checkpoints import latest
from tightbeam.edge.training.recipe_run import TrainResult
from tightbeam.edge.training.run import run_recipe

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

_NUM_BLOCKS = 18
RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=_NUM_BLOCKS).save_pretrained(folder)
    (folder / "public.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    folder = tmp_path_factory.mktemp("cloud")
    fit = ("--projection-text", str(model / "public.txt"), "--projection", str(folder / "p.safetensors"))
    with Cloud(model, folder, *fit) as process:
        yield process


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "cache"))


def _small(path: Path, cloud: Cloud, folder: Path, *settings: str) -> Recipe:
    rows = [{"prompt": f"{n} + 1 =", "completion": f"{n + 1}"} for n in range(12)]
    data = write_jsonl(folder / "data.jsonl", rows)
    recipe = load_recipe(path)
    given = [] if recipe.data.eval is None else [f"data.eval={data}"]
    return load_recipe(
        path,
        [
            f"model.cloud={cloud.address}", "model.identity=null", "model.insecure=true",
            f"data.train={data}", *given, "train.epochs=null", "train.steps=3", "train.batch_size=2",
            "train.threads=1",
            f"output.dir={folder}",
            "output.report=false", *settings,
        ],
    )  # fmt: skip


def _run(recipe: Recipe, *, resume: bool = False) -> TrainResult:
    return run_recipe(recipe, resume=resume, console=quiet()[0])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_an_adapter_that_the_whole_model_opens(
    path: Path, cloud: Cloud, model: Path, tmp_path: Path
) -> None:
    recipe = _small(path, cloud, tmp_path)
    result = _run(recipe)
    assert (result.exit_code, result.optimizer_steps) == (0, 3)
    assert result.adapter is not None
    steps = [row for row in read_ledger(result.folder.ledger) if row["row"] == "step"]
    kinds = {"forward"} if recipe.mode != "ushape" else {"forward", "backward"}
    assert {row["kind"] for row in steps} == kinds
    whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), result.adapter)
    adapted = {
        name.split(".layers.")[1].split(".")[0]
        for name, _ in whole.named_modules()
        if name.endswith("lora_A")
    }
    bottom, top = map(int, recipe.cut.split(":"))
    bottom = 0 if recipe.mode == "top" else bottom
    assert adapted == {str(block) for block in (*range(bottom), *range(_NUM_BLOCKS - top, _NUM_BLOCKS))}


def test_a_split_run_is_repeatable_and_resumes_bit_for_bit(cloud: Cloud, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    path = next(path for path in RECIPES if path.stem == "first-run")
    settings = ("train.steps=8", "train.checkpoint_every=2", "adapter.dropout=0.1", "train.lr=1e-2")
    whole = _run(_small(path, cloud, folders[0], *settings))

    recipe = _small(path, cloud, folders[1], *settings)
    first = _run(recipe)
    checkpoints = first.folder.checkpoints
    (checkpoints / "step-8" / "manifest.json").unlink()  # as if killed after step 6
    warnings: list[str] = []
    assert latest(checkpoints, warnings.append) == checkpoints / "step-6"
    assert len(warnings) == 1
    result = _run(recipe, resume=True)
    for one in (first, result):
        assert one.adapter is not None
        assert whole.adapter is not None
        left, right = (run / "adapter_model.safetensors" for run in (whole.adapter, one.adapter))
        assert left.read_bytes() == right.read_bytes()
    assert torch.get_num_threads() == 1
