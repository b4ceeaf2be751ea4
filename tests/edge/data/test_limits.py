"""What the cloud or the model would refuse at some step is refused before the first, with file and line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.commands import run_command
from support.edge_runs import Steps, byte_tokenizer, quiet, tiny_llama, tiny_recipe, write_jsonl
from support.in_process import InProcessCloud
from support.split_runs import save_tiny_model
from tightbeam.common.errors import DataError, StepTooLargeError, TightbeamError
from tightbeam.edge.data import Limits, check_file
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.training.folder import RunFolder
from tightbeam.edge.training.recipe_run import LoadedModel, train_recipe
from tightbeam.proto import backbone_pb2 as pb

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SHORT = {"prompt": "a", "completion": "b"}


def _refusal(folder: Path, card: pb.Card, **changes: Any) -> TightbeamError:
    """What a run over a cloud with this card ends with, before any step and without a folder."""
    recipe = tiny_recipe(folder, **changes)
    steps = Steps()

    def load(recipe: Recipe) -> LoadedModel:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<new>"])
        return LoadedModel(
            model=tiny_llama(), tokenizer=tokenizer, close=lambda: None, steps=steps, card=card
        )

    with pytest.raises(TightbeamError) as caught:
        train_recipe(recipe, load=load, console=quiet()[0])
    assert steps.num_drained == 0
    assert not RunFolder(recipe.run_folder).config.exists()
    return caught.value


def _card(max_positions: int = 256, max_tokens_per_step: int = 4096) -> pb.Card:
    limits = pb.Limits(max_positions=max_positions, max_tokens_per_step=max_tokens_per_step)
    return pb.Card(config_json=json.dumps({"text_config": {"vocab_size": 261}}), limits=limits)


def _data(folder: Path, rows: list[dict[str, str]]) -> dict[str, str]:
    return {"train": str(write_jsonl(folder / "texts.jsonl", rows))}


LONG = {"prompt": "a", "completion": "b" * 60}


def test_a_sample_beyond_the_models_positions(tmp_path: Path) -> None:
    data = _data(tmp_path, [SHORT] * 20 + [LONG])
    error = _refusal(tmp_path, _card(max_positions=64), data=data)
    assert isinstance(error, DataError)
    assert f"{tmp_path}/texts.jsonl:21 has " in error.message
    assert "more than the 64 that the model has positions for" in error.message
    assert "data.max_length" in error.cure


def test_a_sample_beyond_the_clouds_step(tmp_path: Path) -> None:
    data = _data(tmp_path, [SHORT] * 20 + [LONG])
    error = _refusal(tmp_path, _card(max_tokens_per_step=80), data=data)
    assert "texts.jsonl:21 has " in error.message
    assert "more than the 80 that the cloud takes in a step" in error.message


def test_held_out_samples_count_too(tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [SHORT, LONG])
    error = _refusal(tmp_path, _card(max_positions=64), data={"eval": str(held)})
    assert "held.jsonl:2 has" in error.message


def test_a_batch_that_a_later_epoch_would_bring_together(tmp_path: Path) -> None:
    """Two long samples of 20: whether and when they meet is known from the seed."""
    data = _data(tmp_path, [LONG, *[SHORT] * 18, LONG])
    train = {"steps": 600, "batch_size": 2}
    error = _refusal(tmp_path, _card(max_tokens_per_step=150), data=data, train=train)
    assert isinstance(error, StepTooLargeError)
    assert "texts.jsonl: lines" in error.message
    assert {"1", "20"} == set(error.message.split("lines ")[1].split(" come")[0].split(", "))
    assert "Lower train.batch_size" in error.cure


def test_a_batch_of_an_evaluation(tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [SHORT, LONG, LONG])
    error = _refusal(
        tmp_path, _card(max_tokens_per_step=150), data={"eval": str(held)}, train={"batch_size": 3}
    )
    assert "held.jsonl: lines 1, 2, 3 come in one batch" in error.message


def test_a_token_beyond_the_embedding(tmp_path: Path) -> None:
    data = _data(tmp_path, [SHORT, {"prompt": "a", "completion": "<new>"}])
    error = _refusal(tmp_path, _card(), data=data)
    assert "texts.jsonl:2 has the token 261, beyond the model's 261" in error.message


def test_data_check_says_the_same(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", [SHORT, LONG])
    check_file(path, byte_tokenizer())
    with pytest.raises(DataError, match=r"texts\.jsonl:2 has \d+ tokens, more than the 64"):
        check_file(path, byte_tokenizer(), limits=Limits.of(_card(max_positions=64)))


def test_the_command_asks_the_cloud_or_the_models_config(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    path = write_jsonl(tmp_path / "texts.jsonl", [SHORT, LONG, {"prompt": "a", "completion": "b" * 300}])
    with InProcessCloud(model, tmp_path / "cloud", max_tokens_per_step=80) as cloud:
        of_cloud = run_command(tmp_path, "data", "check", str(path), "--cloud", cloud.listen(), "--insecure")
    assert of_cloud.code == 2
    assert re.search(r"texts\.jsonl:2 has \d+ tokens, more than the 80 that the cloud takes", of_cloud.error)
    of_model = run_command(tmp_path, "data", "check", str(path), "--model", str(model))
    assert of_model.code == 2
    assert re.search(r"texts\.jsonl:3 has \d+ tokens, more than the 256 that the model", of_model.error)


@pytest.mark.parametrize("config", ["[]", "{}", '{"text_config": 3}', '{"vocab_size": "many"}'])
def test_a_config_that_says_nothing_limits_nothing(config: str) -> None:
    assert Limits.of(pb.Card(config_json=config)) == Limits()
