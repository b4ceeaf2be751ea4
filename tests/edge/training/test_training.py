"""The training loop on a tiny model: equal to plain PyTorch, resumable bit for bit, loud when it fails."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support.edge_runs import (
    Steps,
    byte_tokenizer,
    quiet,
    tiny_llama,
    tiny_loader,
    tiny_recipe,
    train_tiny,
    write_jsonl,
)
from tightbeam.common.errors import CloudUnavailableError, DataError, NonFiniteError, RecipeError, UsageError
from tightbeam.edge.data import collate, load_examples
from tightbeam.edge.model.adapters import attach_adapter
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.checkpoints import latest, verify
from tightbeam.edge.training.folder import RunFolder
from tightbeam.edge.training.plan import Plan
from tightbeam.edge.training.recipe_run import INTERRUPTED, LoadedModel, train_recipe

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class CrashError(Exception):
    """What a test throws into a run in place of a power cut."""


def _crash_at(step: int) -> Any:
    def act(done: int) -> None:
        if done == step:
            raise CrashError

    return act


def _never(recipe: Recipe) -> LoadedModel:
    pytest.fail("the model was fetched for nothing")


def _metrics(folder: RunFolder) -> list[dict[str, str]]:
    with folder.metrics.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _numbers(folder: RunFolder) -> list[tuple[str, ...]]:
    return [
        tuple(row[key] for key in ("optimizer_step", "loss", "lr", "grad_norm")) for row in _metrics(folder)
    ]


def _weights(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def _assert_same_run(left: RunFolder, right: RunFolder) -> None:
    """Adapter, optimizer and every loss on the way agree to the last bit."""
    assert _numbers(left) == _numbers(right)
    assert _weights(left) == _weights(right)
    final = f"step-{len(_numbers(left))}"
    for name in ("optimizer.safetensors", "rng.safetensors"):
        assert (left.checkpoints / final / name).read_bytes() == (
            right.checkpoints / final / name
        ).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The 20 steps without a break that every broken run is compared with."""
    return train_tiny(tiny_recipe(tmp_path_factory.mktemp("whole"))).folder


def test_losses_equal_a_plain_pytorch_loop(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, train={"steps": 6, "schedule": "constant", "max_grad_norm": 0, "weight_decay": 0.1}
    )
    result = train_tiny(recipe)

    examples = load_examples(recipe.data.train, byte_tokenizer())
    base = tiny_llama()
    torch.manual_seed(recipe.train.seed)
    model = attach_adapter(base, recipe.adapter).train()
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1
    )
    losses = []
    for step in range(6):
        (rows,) = Plan(len(examples), recipe.train, 0).micro_batches(step)
        loss = model(**collate([examples[row] for row in rows], 0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(str(loss.item()))

    assert [row["loss"] for row in _metrics(result.folder)] == losses


def test_accumulated_micro_batches_weigh_every_token_alike(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    section = {"steps": 4, "checkpoint_every": 0}
    plain = {"adapter": {"r": 2, "dropout": 0.0}}
    whole = train_tiny(tiny_recipe(tmp_path / "a", train={**section, "batch_size": 4}, **plain))
    parts = train_tiny(
        tiny_recipe(tmp_path / "b", train={**section, "batch_size": 2, "gradient_accumulation": 2}, **plain)
    )
    left = [float(row["loss"]) for row in _metrics(whole.folder)]
    right = [float(row["loss"]) for row in _metrics(parts.folder)]
    assert left == pytest.approx(right, abs=1e-5)
    assert len(set(left)) == 4


def test_the_loss_falls_and_evaluation_reports_it(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, data={"eval_fraction": 0.2}, train={"eval_every": 10, "steps": 30})
    result = train_tiny(recipe)
    assert result.first_eval_loss is not None
    assert result.last_eval_loss is not None
    assert result.last_eval_loss < result.first_eval_loss - 0.1
    rows = [row for row in read_ledger(result.folder.ledger) if row["row"] == "eval"]
    assert [row["n"] for row in rows] == [0, 10, 20, 30]
    filled = [row["optimizer_step"] for row in _metrics(result.folder) if row["eval_loss"]]
    assert filled == ["10", "20", "30"]


def test_evaluation_weighs_tokens_not_batches(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": "c" * 40}]
    held_out = write_jsonl(tmp_path / "eval.jsonl", rows)
    losses = []
    for size in (1, 3, 4):
        recipe = tiny_recipe(
            tmp_path,
            data={"eval": str(held_out)},
            train={"batch_size": size, "steps": 1},
            output={"name": f"b{size}"},
        )
        losses.append(train_tiny(recipe).first_eval_loss)
    assert losses[1:] == pytest.approx(losses[:-1], abs=1e-5)


def test_a_crash_between_checkpoints_resumes_bit_for_bit(tmp_path: Path, whole: RunFolder) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(CrashError):
        train_tiny(recipe, _crash_at(13))
    folder = RunFolder(recipe.run_folder)
    assert latest(folder.checkpoints, pytest.fail) == folder.checkpoints / "step-10"
    result = train_tiny(recipe, resume=True)
    assert result.optimizer_steps == 20
    _assert_same_run(result.folder, whole)


def test_comparison_of_runs_sees_a_lost_random_state(tmp_path: Path, whole: RunFolder) -> None:
    recipe = tiny_recipe(tmp_path)

    def disturb(done: int) -> None:
        if done == 12:
            torch.rand(1)  # one draw too many: the dropout of all later steps differs

    with pytest.raises(AssertionError):
        _assert_same_run(train_tiny(recipe, disturb).folder, whole)


def test_a_crash_before_the_first_checkpoint_starts_again(tmp_path: Path, whole: RunFolder) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(CrashError):
        train_tiny(recipe, _crash_at(3))
    console, text = quiet()
    result = train_recipe(recipe, load=tiny_loader(Steps()), resume=True, console=console)
    assert "no checkpoint yet: starting at step 0" in text.getvalue()
    _assert_same_run(result.folder, whole)


def test_sigkill_in_a_process_of_its_own_then_resume(tmp_path: Path, whole: RunFolder) -> None:
    recipe = tiny_recipe(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.resolved_yaml(), encoding="utf-8")
    folder = RunFolder(recipe.run_folder)
    tests = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-m", "support.edge_runs", str(file)], cwd=tests)
    try:
        deadline = time.monotonic() + 120
        while not (folder.checkpoints / "step-5").exists() or len(_metrics(folder)) < 7:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not folder.adapter.exists()
    _assert_same_run(train_tiny(recipe, resume=True).folder, whole)


def test_ctrl_c_finishes_the_step_saves_and_ends_with_130(tmp_path: Path, whole: RunFolder) -> None:
    recipe = tiny_recipe(tmp_path)
    result = train_tiny(recipe, lambda done: signal.raise_signal(signal.SIGINT) if done == 7 else None)
    assert (result.exit_code, result.optimizer_steps, result.adapter) == (INTERRUPTED, 7, None)
    assert verify(result.folder.checkpoints / "step-7") is None
    _assert_same_run(train_tiny(recipe, resume=True).folder, whole)


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    def twice(done: int) -> None:
        if done == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = train_tiny(tiny_recipe(tmp_path), twice)
    assert result.exit_code == INTERRUPTED
    assert latest(result.folder.checkpoints, pytest.fail) == result.folder.checkpoints / "step-5"
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_is_a_request_to_stop_too(tmp_path: Path) -> None:
    result = train_tiny(
        tiny_recipe(tmp_path), lambda done: signal.raise_signal(signal.SIGTERM) if done == 2 else None
    )
    assert (result.exit_code, result.optimizer_steps) == (INTERRUPTED, 2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_spoils_nothing(tmp_path: Path, poison: float) -> None:
    recipe = tiny_recipe(tmp_path)
    model = tiny_llama()

    def act(done: int) -> None:
        if done == 6:
            with torch.no_grad():
                model.get_parameter("model.embed_tokens.weight").fill_(poison)

    closed: list[bool] = []
    with pytest.raises(NonFiniteError, match=r"loss of optimizer step 7 is nan.*lower train\.lr"):
        train_recipe(recipe, load=tiny_loader(Steps(act), model, closed), console=quiet()[0])
    folder = RunFolder(recipe.run_folder)
    assert closed == [True]
    kept = latest(folder.checkpoints, pytest.fail)
    assert kept == folder.checkpoints / "step-5"
    assert all(
        torch.isfinite(tensor).all() for tensor in load_file(kept / "adapter_model.safetensors").values()
    )
    assert not folder.adapter.exists()


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path) -> None:
    model = tiny_llama()

    def explode(module: nn.Module, args: object, logits: Tensor) -> None:
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * torch.inf)

    model.get_submodule("lm_head").register_forward_hook(explode)
    with pytest.raises(NonFiniteError, match="gradient norm of optimizer step 1"):
        train_recipe(tiny_recipe(tmp_path), load=tiny_loader(model=model), console=quiet()[0])


def test_the_saved_adapter_opens_in_peft_with_equal_logits(tmp_path: Path, whole: RunFolder) -> None:
    checkpoint = whole.checkpoints / "step-20"
    assert (checkpoint / "adapter_model.safetensors").read_bytes() == _weights(whole)
    ids = torch.arange(5, 25)[None]
    plain = tiny_llama()(input_ids=ids).logits
    opened = peft.PeftModel.from_pretrained(tiny_llama(), whole.adapter).eval()
    again = peft.PeftModel.from_pretrained(tiny_llama(), checkpoint).eval()
    assert torch.equal(opened(input_ids=ids).logits, again(input_ids=ids).logits)
    assert not torch.allclose(opened(input_ids=ids).logits, plain, atol=1e-3)
    card = (whole.adapter / "README.md").read_text(encoding="utf-8")
    assert "ab" * 32 in card
    assert "the first 1 and the\nlast 1 blocks" in card


def test_ledger_tells_run_steps_and_optimizer_steps(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": 3, "checkpoint_every": 0})
    result = train_tiny(recipe)
    rows = read_ledger(result.folder.ledger)
    assert [row["row"] for row in rows] == ["run"] + ["step", "step", "optimizer_step"] * 3
    assert rows[0]["fingerprint"] == "ab" * 32
    assert (rows[0]["cut"], rows[0]["mode"], rows[0]["dtype"]) == ("1:1", "ushape", "float32")
    last = rows[-1]
    assert last["n"] == 3
    assert last["loss"] == result.last_loss
    assert min(last["tokens"], last["edge_flops"], last["peak_memory_bytes"]) > 0
    assert 0 < last["edge_compute_s"] <= last["wall_s"]
    # forward and backward, 100 each: its own, not those of the steps before it
    assert [row["wire_up_bytes"] for row in _metrics(result.folder)] == ["200", "200", "200"]
    assert (result.folder.checkpoints / "step-3").is_dir()


def test_a_resumed_run_adds_to_the_ledger_and_repeats_no_metrics(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": 10})
    with pytest.raises(CrashError):
        train_tiny(recipe, _crash_at(8))
    result = train_tiny(recipe, resume=True)
    assert [row["optimizer_step"] for row in _metrics(result.folder)] == [str(n) for n in range(1, 11)]
    rows = read_ledger(result.folder.ledger)
    assert sum(row["row"] == "run" for row in rows) == 2
    assert [row["n"] for row in rows if row["row"] == "optimizer_step"] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        6,
        7,
        8,
        9,
        10,
    ]


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    console, text = quiet()
    recipe = tiny_recipe(tmp_path, train={"steps": 3, "checkpoint_every": 0})
    train_recipe(recipe, load=tiny_loader(Steps()), console=console)
    last = text.getvalue().splitlines()[-1]
    for part in ("step 3/3", "loss", "tokens/s", "MB up", "MB down", "s left"):
        assert part in last


def test_a_folder_with_a_run_is_not_trained_into_twice(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": 1})
    train_tiny(recipe)
    with pytest.raises(RecipeError, match=r"already holds a run.*--resume"):
        train_tiny(recipe)
    with pytest.raises(RecipeError, match=r"train\.lr was 0\.01 and is now 0\.5"):
        train_tiny(tiny_recipe(tmp_path, train={"steps": 1, "lr": 0.5}), resume=True)


def test_resuming_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run to resume"):
        train_tiny(tiny_recipe(tmp_path), resume=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": 2})
    before = _weights(train_tiny(recipe).folder)
    result = train_tiny(recipe, resume=True)
    assert (result.exit_code, result.optimizer_steps) == (0, 2)
    assert _weights(result.folder) == before


def test_no_data_stops_before_anything_is_trained(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    recipe = tiny_recipe(tmp_path, data={"train": str(empty)})
    with pytest.raises(DataError, match=r"empty\.jsonl holds no record"):
        train_recipe(recipe, load=_never, console=quiet()[0])
    assert not recipe.run_folder.exists()


def test_a_run_that_could_not_start_does_not_use_up_its_name(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": 1})

    def unreachable(recipe: Recipe) -> LoadedModel:
        raise CloudUnavailableError("No answer.", cure="Start it.")

    with pytest.raises(CloudUnavailableError):
        train_recipe(recipe, load=unreachable, console=quiet()[0])
    assert train_tiny(recipe).exit_code == 0


def test_examples_without_an_answer_are_left_out_and_named(tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "mixed.jsonl",
        [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 300, "completion": "b"}],
    )
    console, text = quiet()
    recipe = tiny_recipe(tmp_path, data={"train": str(data), "max_length": 100}, train={"steps": 1})
    train_recipe(recipe, load=tiny_loader(), console=console)
    assert (
        "1 examples have no answer within max_length and were left out, the first at line 2"
        in text.getvalue()
    )


@pytest.mark.parametrize(
    ("section", "per_epoch", "total"),
    [
        ({"epochs": 2, "batch_size": 4}, 6, 12),
        ({"epochs": 0.5, "batch_size": 4}, 6, 3),
        ({"epochs": 2, "batch_size": 4, "gradient_accumulation": 4}, 2, 4),
        ({"steps": 7, "batch_size": 100}, 1, 7),
    ],
)
def test_plan_counts_optimizer_steps(
    tmp_path: Path, section: dict[str, Any], per_epoch: int, total: int
) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": None, **section})
    plan = Plan(23, recipe.train, 0)
    assert (plan.steps_per_epoch, plan.total_steps) == (per_epoch, total)


def test_plan_shows_every_example_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"batch_size": 4, "gradient_accumulation": 4})
    plan = Plan(23, recipe.train, 7)
    epochs = [
        [row for step in (first, first + 1) for batch in plan.micro_batches(step) for row in batch]
        for first in (0, 2)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 2
    assert epochs[0] != epochs[1]
    position = plan.position(3, 99)
    assert (position.optimizer_step, position.epoch, position.batch, position.tokens) == (3, 1, 4, 99)


def test_recipe_threads_are_used(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train_tiny(tiny_recipe(tmp_path, train={"steps": 1, "threads": 1}))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
