"""What a client does in a round: the adapter it wears, the weights it shares, the steps it takes."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.edge_runs import byte_tokenizer, write_jsonl
from support.federations import save_backbone, sums
from support.in_process import InProcessCloud
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.errors import NonFiniteError, UpdateRefusedError
from tightbeam.edge.data import Example, load_examples
from tightbeam.edge.link.connection import Cloud, connect
from tightbeam.federation.client import (
    AdapterShape,
    CachePlace,
    Lender,
    LocalTask,
    SplitAdapter,
    Workplace,
    held_bytes,
    pad_id,
)
from tightbeam.federation.math import parse_adapter

SHAPE = AdapterShape("1:1", "ushape", 4, 2.0)
TOP = AdapterShape("2:2", "top", 4, 2.0)


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCloud]:
    folder = save_backbone(tmp_path_factory.mktemp("backbone"))
    with InProcessCloud(folder, tmp_path_factory.mktemp("cloud")) as cloud:
        cloud.listen()
        yield cloud


@pytest.fixture
def rows() -> list[StepRow]:
    return []


@pytest.fixture
def cloud(listening: InProcessCloud, rows: list[StepRow]) -> Iterator[Cloud]:
    def on_row(row: dict[str, object]) -> None:
        if row["row"] == "step":
            rows.append(StepRow.from_json(row))

    with connect(listening.address, insecure=True, name="clinic", on_row=on_row) as connected:
        yield connected


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    path = write_jsonl(tmp_path_factory.mktemp("texts") / "sums.jsonl", sums(12))
    return load_examples(path, byte_tokenizer())


def _task(**changes: Any) -> LocalTask:
    base: dict[str, Any] = {
        "steps": 3, "batch_size": 4, "lr": 1e-2, "optimizer": "adamw", "max_grad_norm": 1.0, "proximal": 0.0,
        "first_step": 0, "order_seed": 0, "dropout_seed": 0,
    }  # fmt: skip
    return LocalTask(**(base | changes))


def _work(cloud: Cloud, lender: Lender, shape: AdapterShape = SHAPE, **changes: object) -> Workplace:
    base: dict[str, object] = {
        "lent": lender.lend(cloud, shape, "fp32"),
        "shape": shape,
        "fingerprint": cloud.card.fingerprint,
        "pad_id": pad_id(lender.tokenizer(cloud)),
        "cache": CachePlace(Path("unused"), None, 0),
    }
    return Workplace(**(base | changes))  # type: ignore[arg-type]  # one value per field


def _random(adapter: SplitAdapter, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.02, shape).astype(np.float32) for n, shape in adapter.layers().items()}


def test_what_is_worn_is_what_comes_back(cloud: Cloud) -> None:
    adapter = Lender().lend(cloud, SHAPE, "fp32")
    arrays = _random(adapter, 1)
    adapter.wear(arrays)
    back = adapter.arrays()
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
    assert all(".lora_B." in name for name in adapter.arrays(only_B=True))
    back[next(iter(back))][:] = 7
    assert not np.array_equal(adapter.arrays()[next(iter(back))], back[next(iter(back))]), "a copy"


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_an_adapter_that_does_not_fit_is_refused_by_name(cloud: Cloud, change: str) -> None:
    adapter = Lender().lend(cloud, SHAPE, "fp32")
    arrays = _random(adapter, 1)
    name = sorted(arrays)[0]
    if change == "missing":
        del arrays[name]
    elif change == "extra":
        name = "a.lora_A.weight"
        arrays[name] = np.zeros((1, 1), np.float32)
    else:
        arrays[name] = arrays[name][1:]
    with pytest.raises(UpdateRefusedError, match=name.replace(".", r"\.")):
        adapter.wear(arrays)


def test_training_is_a_function_of_adapter_data_and_seed(
    cloud: Cloud, examples: list[Example], rows: list[StepRow]
) -> None:
    work = _work(cloud, Lender())
    adapter = work.lent
    start, results = _random(adapter, 1), []
    for seed in (0, 0, 1):
        adapter.wear(start)
        rows.clear()
        done = work.train(examples, _task(order_seed=seed), rows)
        results.append(adapter.arrays())
    assert all(np.array_equal(results[0][name], results[1][name]) for name in start)
    assert any(not np.array_equal(results[0][name], results[2][name]) for name in start)
    assert done.steps == 3
    assert [row.kind for row in done.rows] == ["forward", "backward"] * 3
    assert done.tokens == sum(row.tokens for row in done.rows if row.kind == "forward")
    assert done.tokens == work.plan_tokens(examples, _task(order_seed=1))
    assert done.edge_flops == work.planned_flops(examples, _task(order_seed=1))
    assert done.rows == rows
    assert 0 < done.edge_s < done.wall_s


def test_rounds_go_on_where_the_last_one_stopped(cloud: Cloud, examples: list[Example]) -> None:
    """Two rounds of two steps see the batches of one round of four."""
    work = _work(cloud, Lender())
    adapter = work.lent
    start = _random(adapter, 1)
    sgd = {"optimizer": "sgd", "lr": 0.1, "max_grad_norm": 0}
    adapter.wear(start)
    work.train(examples, _task(steps=4, **sgd), [])
    at_once = adapter.arrays()
    adapter.wear(start)
    for first in (0, 2):
        work.train(examples, _task(steps=2, first_step=first, **sgd), [])
    assert all(np.array_equal(at_once[name], array) for name, array in adapter.arrays().items())


def test_a_schedule_runs_over_all_rounds(cloud: Cloud, examples: list[Example]) -> None:
    work = _work(cloud, Lender())
    adapter, start = work.lent, _random(work.lent, 1)
    sgd = {"optimizer": "sgd", "lr": 0.1, "schedule": "linear", "warmup_steps": 1, "scheduled_steps": 4}
    adapter.wear(start)
    work.train(examples, _task(steps=4, **sgd), [])
    at_once = adapter.arrays()
    adapter.wear(start)
    for first in (0, 2):
        work.train(examples, _task(steps=2, first_step=first, **sgd), [])
    assert all(np.array_equal(at_once[name], array) for name, array in adapter.arrays().items())
    adapter.wear(start)
    work.train(examples, _task(steps=4, **(sgd | {"schedule": "constant"})), [])
    assert any(not np.array_equal(at_once[name], array) for name, array in adapter.arrays().items())


def test_accumulated_micro_batches_are_one_step(cloud: Cloud, examples: list[Example]) -> None:
    work = _work(cloud, Lender())
    adapter, start, found, rows = work.lent, _random(work.lent, 1), [], list[StepRow]()
    for size, accumulation in ((4, 1), (2, 2)):
        task = _task(batch_size=size, gradient_accumulation=accumulation, optimizer="sgd", proximal=0.5)
        adapter.wear(start)
        done = work.train(examples, task, rows)
        assert done.edge_flops == work.planned_flops(examples, task)
        assert (done.steps, done.tokens) == (3, work.plan_tokens(examples, task))
        found.append(adapter.arrays())
    whole, parts = found
    assert all(np.allclose(whole[name], parts[name], atol=1e-6) for name in whole)
    assert any(not np.array_equal(whole[name], start[name]) for name in whole)


def test_noise_blurs_what_a_frozen_trunk_gave(cloud: Cloud, examples: list[Example]) -> None:
    work = _work(cloud, Lender(), TOP)
    start, losses = _random(work.lent, 1), []
    for noise in (0.0, 0.0, 0.5):
        work.lent.wear(start)
        losses.append(work.train(examples, _task(noise=noise), []).loss)
    assert losses[0] == losses[1] != losses[2]


def test_only_b_leaves_a_alone(cloud: Cloud, examples: list[Example]) -> None:
    work = _work(cloud, Lender())
    adapter = work.lent
    start = _random(adapter, 1)
    adapter.wear(start)
    both = work.planned_flops(examples, _task())
    work.train(examples, _task(only_B=True), [])
    after = adapter.arrays()
    assert all(np.array_equal(after[name], start[name]) for name in start if ".lora_A." in name)
    assert all(not np.array_equal(after[name], start[name]) for name in start if ".lora_B." in name)
    assert work.planned_flops(examples, _task(only_B=True)) < both, "frozen factors need no weight gradient"


def test_a_loss_that_is_not_finite_ends_the_round(cloud: Cloud, examples: list[Example]) -> None:
    work = _work(cloud, Lender())
    adapter = work.lent
    adapter.wear(_random(adapter, 1))
    task = _task(lr=1e30, optimizer="sgd", max_grad_norm=0, steps=4)
    with pytest.raises(NonFiniteError):
        work.train(examples, task, [])


def test_models_of_all_shapes_share_one_copy_of_the_weights(cloud: Cloud) -> None:
    lender = Lender()
    one, other = (
        lender.lend(cloud, AdapterShape(cut, "ushape", r, 2.0), "fp32") for cut, r in (("1:1", 4), ("2:2", 8))
    )
    again = lender.lend(cloud, AdapterShape("1:1", "ushape", 4, 2.0), "bf16")
    assert again is one

    def pointers(adapter: SplitAdapter) -> set[int]:
        return {p.data_ptr() for name, p in adapter.model.named_parameters() if "lora_" not in name}

    assert pointers(one) < pointers(other)


def test_what_is_folded_is_felt_and_taken_out_again(cloud: Cloud, examples: list[Example]) -> None:
    """Folding delta W equals wearing it, and leaves no trace for the next client."""
    work = _work(cloud, Lender())
    adapter = work.lent
    blank = {name: np.zeros_like(array) for name, array in _random(adapter, 1).items()}
    learned = _random(adapter, 2)

    def loss() -> float:
        return work.evaluate(examples, 4, []).loss

    adapter.wear(blank)
    untouched = loss()
    adapter.wear(learned)
    worn = loss()
    adapter.wear(blank, parse_adapter(learned, SHAPE.scale, "test"))
    folded = loss()
    adapter.wear(blank)
    after = loss()
    assert folded == pytest.approx(worn, rel=1e-6)
    assert abs(worn - untouched) > 1e-4
    assert after == untouched


def test_in_mode_top_the_bottom_has_no_adapter_and_nothing_comes_back(
    cloud: Cloud, examples: list[Example], rows: list[StepRow]
) -> None:
    work = _work(cloud, Lender(), TOP)
    blocks = {name.split(".layers.")[1].split(".")[0] for name in work.lent.layers()}
    assert blocks == {"4", "5"}
    assert not work.lent.below
    work.lent.wear(_random(work.lent, 1))
    done = work.train(examples, _task(), rows)
    assert [row.kind for row in done.rows] == ["forward"] * 3


@pytest.mark.parametrize("shape", ["top", "frozen"])
def test_a_cache_makes_every_text_cross_once_and_changes_no_bit(
    cloud: Cloud, examples: list[Example], rows: list[StepRow], tmp_path: Path, shape: str
) -> None:
    """Twelve examples, three steps a round: after four rounds each was seen four times."""
    lender, results = Lender(), []
    for max_gb in (0.0, 1.0):
        rows.clear()
        how = TOP if shape == "top" else SHAPE
        place = CachePlace(tmp_path / "cache", None, max_gb)
        work = _work(cloud, lender, how, cache=place, frozen=shape == "frozen")
        work.lent.wear(_random(work.lent, 1))
        crossed = []
        for first in (0, 3, 6, 9):
            task, before = _task(first_step=first, steps=3), len(rows)
            planned = work.plan_tokens(examples, task), work.planned_flops(examples, task)
            done = work.train(examples, task, [])
            assert done.edge_flops == planned[1]
            crossed.append(sum(row.tokens for row in rows[before:]))
            assert crossed[-1] == planned[0]
        everything = sum(len(e.input_ids) for e in examples)
        assert crossed == ([everything, 0, 0, 0] if max_gb else [everything] * 4)
        loss = [work.evaluate(examples, 5, []).loss for _ in range(2)]
        results.append((work.lent.arrays(), loss))
    assert results[0][1] == results[1][1]
    assert all(np.array_equal(results[0][0][name], array) for name, array in results[1][0].items())


def test_only_what_is_missing_crosses(
    cloud: Cloud, examples: list[Example], rows: list[StepRow], tmp_path: Path
) -> None:
    """A client that was not sampled in between meets batches of which it holds a part."""
    work = _work(cloud, Lender(), TOP, cache=CachePlace(tmp_path / "cache", None, 1.0))
    work.lent.wear(_random(work.lent, 1))
    work.train(examples, _task(steps=1), [])
    assert rows[0].segments == 4
    work.train(examples, _task(first_step=3, steps=3), [])
    assert sum(row.segments for row in rows) == 12


def test_a_frozen_bottom_stays_and_the_top_learns(cloud: Cloud, examples: list[Example]) -> None:
    work = _work(cloud, Lender(), frozen=True)
    start = _random(work.lent, 1)
    work.lent.wear(start)
    work.train(examples, _task(), [])
    after = work.lent.arrays()
    assert work.lent.below
    assert all(np.array_equal(after[name], start[name]) == (name in work.lent.below) for name in start)


def test_what_is_shared_follows_the_cut(cloud: Cloud) -> None:
    lent = Lender().lend(cloud, AdapterShape("2:1", "ushape", 4, 2.0), "fp32")
    assert {name.split(".layers.")[1].split(".")[0] for name in lent.below} == {"0", "1"}
    assert lent.shared("all") == lent.layers().keys()
    assert lent.shared("top") == lent.layers().keys() - lent.below
    assert lent.shared("none") == set()


def test_evaluation_is_the_mean_over_learned_tokens(cloud: Cloud, examples: list[Example]) -> None:
    work = _work(cloud, Lender())
    adapter = work.lent
    adapter.wear(_random(adapter, 1))
    whole = work.evaluate(examples, 64, [])
    parts = [work.evaluate([example], 1, []) for example in examples]
    by_hand = sum(part.loss * part.learned_tokens for part in parts) / sum(p.learned_tokens for p in parts)
    assert whole.loss == pytest.approx(by_hand, rel=1e-5)
    assert whole.learned_tokens == sum(example.num_learned for example in examples)
    assert work.evaluate(examples, 5, []).loss == pytest.approx(whole.loss, rel=1e-5)


def test_held_bytes_are_what_is_fetched(cloud: Cloud) -> None:
    blobs = {blob.name: blob.num_bytes for blob in cloud.card.blobs}
    edge = ("block.0", "block.5")
    fetched = [name for name in blobs if not name.startswith(("file/", "block.")) or name in edge]
    assert held_bytes(blobs, "1:1", 6) == sum(blobs[name] for name in fetched)
    assert held_bytes(blobs, "3:3", 6) == sum(n for name, n in blobs.items() if not name.startswith("file/"))


def test_memory_counts_weights_gradients_and_optimizer(cloud: Cloud) -> None:
    adapter = Lender().lend(cloud, SHAPE, "fp32")
    lora = sum(4 * math.prod(shape) for shape in adapter.layers().values())
    assert adapter.training_bytes("adamw") - adapter.weight_bytes == 3 * lora
    assert adapter.training_bytes("sgd") - adapter.weight_bytes == lora
