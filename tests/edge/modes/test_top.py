"""Mode `top`: each sample crosses once, only as a cut activation, and training is that of the whole model."""

import signal
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.cached_runs import (
    A_SAMPLE,
    ALL,
    CrashError,
    Crossing,
    cached_recipe,
    losses,
    train_over,
)
from support.edge_runs import byte_tokenizer
from support.in_process import InProcessCloud
from support.local_runs import local_losses
from tightbeam.common.errors import BudgetError, RecipeError
from tightbeam.common.wire.codecs import codec as wire_codec
from tightbeam.edge.cache.store import shard_paths
from tightbeam.edge.data import collate, load_examples, split_examples
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.folder import RunFolder
from tightbeam.edge.training.recipe_run import INTERRUPTED

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EVAL = {"eval_fraction": 0.2}


def whole_model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def weights(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def evals(run: RunFolder) -> list[float]:
    return [row["loss"] for row in read_ledger(run.ledger) if row["row"] == "eval"]


PLAIN = {"adapter": {"r": 2, "alpha": 4, "dropout": 0.0}}
# Adam makes much of rounding at a higher rate.
CONSTANT = {
    "schedule": "constant",
    "max_grad_norm": 0,
    "lr": 1e-3,
}


def test_training_is_that_of_the_whole_model(cloud: InProcessCloud, folder: Path, tmp_path: Path) -> None:
    recipe = cached_recipe(tmp_path, train={**CONSTANT, "epochs": 2}, **PLAIN)
    result, _ = train_over(cloud, recipe)
    expected = local_losses(recipe, folder, range(4, 6))
    assert len(expected) == 16  # an epoch that fetches and one that does not
    assert [float(loss) for loss in losses(result.folder)] == pytest.approx(expected, abs=1e-5)
    other = local_losses(recipe, folder, range(3, 6))  # and the comparison can tell
    assert [float(loss) for loss in losses(result.folder)] != pytest.approx(other, abs=1e-5)


def test_the_cache_changes_no_bit(cloud: InProcessCloud, tmp_path: Path) -> None:
    """Dropout is on: both runs draw the same masks."""
    cached, crossed_once = train_over(cloud, cached_recipe(tmp_path / "a", data=EVAL))
    fetched, crossed = train_over(cloud, cached_recipe(tmp_path / "b", data=EVAL, cache={"enabled": False}))
    assert losses(cached.folder) == losses(fetched.folder)
    assert evals(cached.folder) == evals(fetched.folder)
    assert weights(cached.folder) == weights(fetched.folder)
    steps = cached.optimizer_steps
    assert len(crossed.rows) == steps + 2 * 2  # each batch, and two batches in each of two evaluations
    assert len(crossed_once.rows) == steps // 3 + 2
    assert len({str(row.bytes) for row in crossed.rows}) > 1


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
def test_a_coded_cache_holds_what_crossed(cloud: InProcessCloud, tmp_path: Path, codec: str) -> None:
    cached, crossing = train_over(cloud, cached_recipe(tmp_path / "a", codec=codec))
    fetched, _ = train_over(cloud, cached_recipe(tmp_path / "b", codec=codec, cache={"enabled": False}))
    assert losses(cached.folder) == losses(fetched.folder)
    payload = sum(wire_codec(codec).num_bytes((row.tokens, 16)) for row in crossing.rows)
    entries = sum(path.stat().st_size for path in shard_paths(cached.folder.path / "cache"))
    assert entries < payload + 23 * (1 + 16 + 110) + 1500


def test_labels_alone_change_nothing_that_crosses(cloud: InProcessCloud, tmp_path: Path) -> None:
    """The same texts with other tokens learned: other losses, the same bytes in the same order."""

    def crossed(name: str, answer_only: bool) -> tuple[list[str], Crossing]:
        recipe = cached_recipe(tmp_path / name, data={"answer_only": answer_only})
        result, crossing = train_over(cloud, recipe)
        return losses(result.folder), crossing

    (one, first), (other, second) = crossed("a", True), crossed("b", False)
    assert one != other
    assert len(first.messages) == len(second.messages)
    for (left, payload), (right, again) in zip(first.messages, second.messages, strict=True):
        assert left.SerializeToString() == right.SerializeToString()
        assert all(torch.equal(a, b) for a, b in zip(payload, again, strict=True))


def test_the_adapter_opens_on_the_whole_model(cloud: InProcessCloud, folder: Path, tmp_path: Path) -> None:
    result, _ = train_over(cloud, cached_recipe(tmp_path, data=EVAL, **PLAIN))
    whole = peft.PeftModel.from_pretrained(whole_model(folder), result.folder.adapter)
    adapted = {
        name.split(".layers.")[1].split(".")[0] for name, _ in whole.named_modules() if "lora_A" in name
    }
    assert adapted == {"4", "5"}
    recipe = cached_recipe(tmp_path, data=EVAL, **PLAIN)
    examples = split_examples(load_examples(recipe.data.train, byte_tokenizer()), 0.2, 0)[1]
    with torch.no_grad():
        batches = [collate([e], 0) for e in examples]
        total = sum(
            float(whole(**batch).loss) * e.num_learned for batch, e in zip(batches, examples, strict=True)
        )
    assert total / sum(e.num_learned for e in examples) == pytest.approx(evals(result.folder)[-1], abs=1e-5)
    assert evals(result.folder)[-1] < evals(result.folder)[0]


def test_an_early_end_accounts_for_what_was_on_its_way(cloud: InProcessCloud, tmp_path: Path) -> None:
    """Two of eight steps: nothing is fetched that no step needs, and the edge's rows are the cloud's."""
    train = {"epochs": None, "steps": 2}
    result, crossing = train_over(cloud, cached_recipe(tmp_path, train=train))
    assert sum(row.segments for row in crossing.rows) == 6
    written = [row for row in read_ledger(result.folder.ledger) if row["row"] == "step"]
    assert len(written) == len(crossing.messages) == 2


def test_a_checkpoint_waits_for_what_is_on_its_way(cloud: InProcessCloud, tmp_path: Path) -> None:
    """Stopped in the first epoch with steps in flight: all of them are in the ledger and in the cache."""
    recipe = cached_recipe(tmp_path, train={"batch_size": 1})

    def stop(rows: int) -> None:
        if rows == 5:
            signal.raise_signal(signal.SIGINT)

    result, crossing = train_over(cloud, recipe, act=stop, max_tokens_per_step=A_SAMPLE)
    assert result.exit_code == INTERRUPTED
    assert result.optimizer_steps < 23
    written = [row for row in read_ledger(result.folder.ledger) if row["row"] == "step"]
    assert len(written) == len(crossing.messages) > result.optimizer_steps
    resumed, rest = train_over(cloud, recipe, resume=True, max_tokens_per_step=A_SAMPLE)
    assert resumed.exit_code == 0
    assert len(written) + len(rest.rows) == 23  # nothing crossed twice


def test_a_crash_while_filling_resumes_bit_for_bit(cloud: InProcessCloud, tmp_path: Path) -> None:
    train = {"checkpoint_every": 2}
    whole, crossing = train_over(cloud, cached_recipe(tmp_path / "a", train=train))

    def crash(rows: int) -> None:
        if rows == 7:
            raise CrashError

    recipe = cached_recipe(tmp_path / "b", train=train)
    with pytest.raises(CrashError):
        train_over(cloud, recipe, act=crash)
    result, rest = train_over(cloud, recipe, resume=True)
    assert losses(result.folder) == losses(whole.folder)
    assert weights(result.folder) == weights(whole.folder)
    assert len(rest.rows) < len(crossing.rows)  # what was on disk did not cross again


def test_a_small_cache_trains_the_same_through_the_cloud(cloud: InProcessCloud, tmp_path: Path) -> None:
    train = {"batch_size": 1, "steps": 40, "epochs": None}
    whole, once = train_over(cloud, cached_recipe(tmp_path / "a", train=train), max_tokens_per_step=A_SAMPLE)
    recipe = cached_recipe(tmp_path / "b", train=train, cache={"max_gb": 2e-5})
    small, often = train_over(cloud, recipe, max_tokens_per_step=A_SAMPLE)
    assert losses(small.folder) == losses(whole.folder)
    assert often.said.count("is full") == 1
    assert len(once.rows) == 23
    assert len(often.rows) > 23


def test_a_budget_too_small_for_one_pass_is_refused(cloud: InProcessCloud, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"train.max_mb is 0.01"):
        train_over(cloud, cached_recipe(tmp_path / "a", train={"max_mb": 0.01}))
    result, crossing = train_over(cloud, cached_recipe(tmp_path / "b", train={"max_mb": 0.2}))
    assert result.exit_code == 0
    assert 0.01e6 < sum(row.bytes.wire_total_bytes for row in crossing.rows) < 0.2e6


def test_a_budget_counts_shared_rows_once(cloud: InProcessCloud, tmp_path: Path) -> None:
    _, crossing = train_over(cloud, cached_recipe(tmp_path / "a"), max_tokens_per_step=ALL)
    (row,) = crossing.rows
    assert row.shared_tokens > 0.15 * row.tokens
    tight = {"max_mb": 1.06 * row.bytes.wire_total_bytes / 1e6}
    recipe = cached_recipe(tmp_path / "b", train=tight)
    result, again = train_over(cloud, recipe, max_tokens_per_step=ALL)
    assert (result.exit_code, len(again.rows)) == (0, 1)
    recipe = cached_recipe(tmp_path / "c", train=tight)
    with pytest.raises(BudgetError):
        train_over(cloud, recipe, share_prefixes=False, max_tokens_per_step=ALL)


def test_an_adapter_below_the_cut_is_refused(cloud: InProcessCloud, tmp_path: Path) -> None:
    adapter = {"r": 2, "extra": {"modules_to_save": ["embed_tokens"]}}
    with pytest.raises(RecipeError, match="below the cut"):
        train_over(cloud, cached_recipe(tmp_path, adapter=adapter))


def test_training_starts_while_the_cache_fills(cloud: InProcessCloud, tmp_path: Path) -> None:
    """Also behind a first evaluation, which waits for its own samples and not for all."""
    recipe = cached_recipe(tmp_path, data=EVAL, train={"batch_size": 1})
    result, crossing = train_over(cloud, recipe, max_tokens_per_step=A_SAMPLE)
    kinds = [row["row"] for row in read_ledger(result.folder.ledger)]
    assert len(crossing.rows) == 23
    assert 5 <= kinds[: kinds.index("eval")].count("step") <= 5 + 4  # its own, and the window
