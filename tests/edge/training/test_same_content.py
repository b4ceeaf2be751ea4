"""A resumed run must have what it began with, by content: what changed is named, a path is not."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from support.edge_runs import CHATML, Steps, byte_tokenizer, quiet, tiny_llama, tiny_recipe
from tightbeam.common.errors import RecipeError
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.training.folder import RunFolder
from tightbeam.edge.training.recipe_run import LoadedModel, train_recipe
from tightbeam.proto.backbone_pb2 import Card, Limits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SHORT = {"steps": 6, "checkpoint_every": 2}


class CrashError(Exception):
    """What a test throws into a run in place of a power cut."""


def _crash(done: int) -> None:
    if done == 4:
        raise CrashError


def _loader(
    act: Callable[[int], None] = lambda done: None,
    *,
    template: str = CHATML,
    trunk: str = "float32",
    fingerprint: str = "ab" * 32,
    pad: str = "<pad>",
) -> Callable[[Recipe], LoadedModel]:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens([pad])
    card = Card(
        dtype=trunk,
        config_json='{"vocab_size": 261}',
        limits=Limits(max_positions=256, max_tokens_per_step=4096),
    )
    return lambda recipe: LoadedModel(
        model=tiny_llama(), tokenizer=tokenizer, close=lambda: None, steps=Steps(act), card=card,
        fingerprint=fingerprint,
    )  # fmt: skip


def _crashed(folder: Path) -> Recipe:
    recipe = tiny_recipe(folder, train=SHORT)
    with pytest.raises(CrashError):
        train_recipe(recipe, load=_loader(_crash), console=quiet()[0])
    return recipe


def _weights(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def test_the_same_bytes_at_another_path_go_on(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = train_recipe(tiny_recipe(tmp_path / "whole", train=SHORT), load=_loader(), console=quiet()[0])
    recipe = _crashed(tmp_path)
    moved = tmp_path / "elsewhere.jsonl"
    recipe.data.train.rename(moved)
    again = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": moved})})
    result = train_recipe(again, load=_loader(), resume=True, console=quiet()[0])
    assert _weights(result.folder) == _weights(whole.folder)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (_loader(template=CHATML + "{{ '\\n' }}"), "chat template"),
        (_loader(trunk="bfloat16"), "cloud's dtype was float32 and is now bfloat16"),
        (_loader(fingerprint="cd" * 32), "backbone was abab"),
        (_loader(pad="<unused>"), "tokenizer"),
    ],
)
def test_what_the_run_was_not_trained_with_is_named(
    tmp_path: Path, changed: Callable[[Recipe], LoadedModel], name: str
) -> None:
    recipe = _crashed(tmp_path)
    with pytest.raises(RecipeError, match=rf"step-2 was taken with something else: .*{re.escape(name)}"):
        train_recipe(recipe, load=changed, resume=True, console=quiet()[0])
    train_recipe(recipe, load=_loader(), resume=True, console=quiet()[0])  # nothing was lost


@pytest.mark.parametrize("kept", [22, 10])
def test_a_file_that_was_cut_short_is_named(tmp_path: Path, kept: int) -> None:
    recipe = _crashed(tmp_path)
    lines = recipe.data.train.read_text(encoding="utf-8").splitlines(keepends=True)
    recipe.data.train.write_text("".join(lines[:kept]), encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"something else: data\.train was \w+ and is now \w+\. Resume with"
    ):
        train_recipe(recipe, load=_loader(), resume=True, console=quiet()[0])


def test_held_out_examples_are_content_too(tmp_path: Path) -> None:
    held = tmp_path / "eval.jsonl"
    held.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    recipe = tiny_recipe(tmp_path, train=SHORT, data={"eval": str(held)})
    with pytest.raises(CrashError):
        train_recipe(recipe, load=_loader(_crash), console=quiet()[0])
    held.write_text('{"prompt": "a", "completion": "c"}\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"something else: data\.eval was"):
        train_recipe(recipe, load=_loader(), resume=True, console=quiet()[0])
