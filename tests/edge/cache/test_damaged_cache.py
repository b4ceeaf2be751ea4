"""What is wrong with a cache is named, and its samples are fetched again: never trained on silently.

Every case in `top` and in `side`, whose entries hold taps as well; each ends with the very losses of a run
that nothing happened to.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from support.cached_runs import Crossing, cached_recipe, train_over
from support.commands import Cloud, run_command
from support.edge_runs import byte_tokenizer, write_jsonl
from support.in_process import InProcessCloud
from tightbeam.common.errors import IdentityError
from tightbeam.edge.cache.store import shard_paths
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.recipe_run import TrainResult

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MODES: dict[str, dict[str, Any]] = {
    "top": {"mode": "top"},
    "side": {"mode": "side", "side": {"taps": 2, "width": 16, "heads": 2}},
}
each_mode = pytest.mark.parametrize("mode", MODES)


class Runs:
    """Short runs of a mode, each in a folder of its own, on one cache."""

    def __init__(self, cloud: InProcessCloud, folder: Path, mode: str) -> None:
        self._cloud, self._folder, self.mode = cloud, folder, mode
        self._number = 0
        self.cache = folder / "cache"

    def train(
        self, *, replace: tuple[str, str] | None = None, **options: Any
    ) -> tuple[list[float], Crossing]:
        """Train; gives the losses and what crossed. `replace` changes the texts."""
        self._number += 1
        section = {"dir": str(self.cache)}
        recipe = cached_recipe(
            self._folder / str(self._number), cache=section, train={"epochs": 2}, **MODES[self.mode]
        )
        if replace is not None:
            text = recipe.data.train.read_text()
            assert text.count(replace[0]) == 1
            recipe.data.train.write_text(text.replace(*replace))
        result, crossing = train_over(self._cloud, recipe, **options)
        return losses(result), crossing

    def shard(self) -> Path:
        (path,) = shard_paths(self.cache)
        return path


def losses(result: TrainResult) -> list[float]:
    return [row["loss"] for row in read_ledger(result.folder.ledger) if row["row"] == "optimizer_step"]


@pytest.fixture
def runs(cloud: InProcessCloud, tmp_path: Path, mode: str) -> Runs:
    return Runs(cloud, tmp_path, mode)


@each_mode
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damage_is_named_and_fetched_again(runs: Runs, damage: str) -> None:
    first, _ = runs.train()
    shard = runs.shard()
    raw = bytearray(shard.read_bytes())
    raw[-10] ^= 1
    shard.write_bytes(raw if damage == "flip" else raw[:-1])
    second, crossing = runs.train()
    assert second == first
    assert shard.name in crossing.said
    assert "fetched again" in crossing.said
    # the entry that was hit may hold what side's bottom gave, which is computed again
    assert (len(crossing.rows) <= 1) == (damage == "flip")
    assert crossing.rows or runs.mode == "side"
    third, nothing = runs.train()
    assert third == first
    assert nothing.rows == []  # a shared cache: another run on the same data asks for nothing


@each_mode
def test_a_foreign_shard_is_named_and_left_unread(runs: Runs, cloud: InProcessCloud, tmp_path: Path) -> None:
    """Of another identity's cache, in the place of the only shard of ours."""
    first, whole = runs.train()
    other = Runs(cloud, tmp_path / "other", runs.mode)
    other.train(secret=b"t" * 32)
    runs.shard().unlink()
    (runs.cache / other.shard().name).write_bytes(other.shard().read_bytes())
    second, crossing = runs.train()
    assert second == first
    assert other.shard().name in crossing.said
    assert "another key" in crossing.said
    assert len(crossing.rows) == len(whole.rows)


@each_mode
def test_a_stranger_cannot_use_the_cache(runs: Runs) -> None:
    runs.train()
    with pytest.raises(IdentityError, match="another identity"):
        runs.train(secret=b"t" * 32)


@each_mode
def test_a_changed_sample_crosses_and_nothing_else(runs: Runs, cloud: InProcessCloud, tmp_path: Path) -> None:
    runs.train()
    change = ('"5 + 1 =', '"5 + one =')
    changed, crossing = runs.train(replace=change)
    assert sum(row.segments for row in crossing.rows) in range(1, 4)  # its group of three at most
    fresh, everything = Runs(cloud, tmp_path / "fresh", runs.mode).train(replace=change)
    assert changed == fresh
    assert sum(row.segments for row in everything.rows) == 23


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The same bytes, the first sixty under each other's numbers."""
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    letters = [token for token, number in vocab.items() if 5 <= number < 65]
    state["model"]["vocab"] = vocab | {
        one: vocab[other] for one, other in zip(letters, reversed(letters), strict=True)
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", clean_up_tokenization_spaces=False, chat_template=tokenizer.chat_template,
    )  # fmt: skip


@each_mode
def test_a_changed_tokenizer_finds_nothing(runs: Runs, cloud: InProcessCloud, tmp_path: Path) -> None:
    first, _ = runs.train()
    changed, crossing = runs.train(tokenizer=other_tokenizer())
    assert sum(row.segments for row in crossing.rows) == 23
    assert changed != first
    assert changed == Runs(cloud, tmp_path / "fresh", runs.mode).train(tokenizer=other_tokenizer())[0]
    again, nothing = runs.train()  # and the old one finds its own
    assert again == first
    assert nothing.rows == []


@pytest.mark.parametrize("mode", ["side"])
def test_a_full_disk_is_said_once_and_changes_no_bit(folder: Path, tmp_path: Path, mode: str) -> None:
    """No file may grow beyond a bound that only the shard exceeds."""
    data = write_jsonl(
        tmp_path / "long.jsonl", [{"prompt": f"{n} times", "completion": "a word " * 30} for n in range(24)]
    )
    fit = (
        "--projection-text",
        str(folder / "public.txt"),
        "--projection",
        "p.safetensors",
        "--tap-size",
        "4",
    )
    found: dict[str, bytes] = {}
    with Cloud(folder, tmp_path / "cloud", *fit) as process:
        for name, limit in (("roomy", None), ("full", 200_000)):
            recipe = cached_recipe(
                tmp_path / name,
                model={"cloud": process.address, "insecure": True},
                data={"train": str(data)},
                train={"epochs": 2},
                **MODES[mode],
            )
            (tmp_path / name / "recipe.yaml").write_text(recipe.resolved_yaml())
            ended = run_command(tmp_path / name, "train", "recipe.yaml", max_file_bytes=limit)
            assert ended.code == 0, ended.err
            said = " ".join(ended.err.split())  # a terminal's line breaks depend on the length of paths
            assert said.count("go through the cloud in every epoch") == (name == "full")
            adapter = recipe.run_folder / "adapter"
            found[name] = b"".join(path.read_bytes() for path in sorted(adapter.glob("*.safetensors")))
            sizes = [path.stat().st_size for path in shard_paths(recipe.run_folder / "cache")]
            assert (sum(sizes) > 200_000) == (name == "roomy")
    assert found["full"] == found["roomy"]
