"""benchmarks/mixed_ranks.py trains what it says: clients side by side as each alone, folds as FLoRA does."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from support.edge_runs import byte_tokenizer, tiny_llama, write_jsonl

ROOT = Path(__file__).parents[3]
WORDS = ("paint", "canvas", "orchard", "harvest", "kernel", "socket")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("mixed_ranks", ROOT / "benchmarks" / "mixed_ranks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    assert "flwr" not in vars(module)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A backbone of six blocks, and 480 entries about things that come in pairs."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny_llama(num_hidden_layers=6).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    entries = []
    for number in range(480):
        pair = 2 * (number % 3)
        words = " ".join(WORDS[pair + index] for index in rng.integers(0, 2, 4))
        entries.append({"prompt": f"{number}?\n", "completion": words})
    write_jsonl(folder / "train.jsonl", entries[:440])
    write_jsonl(folder / "eval.jsonl", entries[440:])
    return folder / "model", folder


@pytest.fixture
def federation(bench: ModuleType, places: tuple[Path, Path]) -> Any:
    return bench.Federation(*places, "cpu", "1:1", 16)


def alone(federation: Any, model: Path, state: dict[str, Any], rank: int, rows: list[int]) -> dict[str, Any]:
    """Two AdamW steps of one client under PEFT, both on the same rows."""
    targets = [name.removeprefix("base_model.model.") for name in federation.layers]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    set_peft_model_state_dict(peft, {name: torch.from_numpy(a) for name, a in state.items()})
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    examples = [federation.train[row] for row in rows]
    length = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([one + [0] * (length - len(one)) for one, _ in examples])
    labels = torch.full_like(ids, -100)
    for row, (one, prompt) in enumerate(examples):
        labels[row, prompt : len(one)] = ids[row, prompt : len(one)]
    for _ in range(2):
        peft(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.numpy() for name, tensor in get_peft_model_state_dict(peft).items()}


def test_clients_side_by_side_learn_what_each_learns_alone(
    bench: ModuleType, federation: Any, places: tuple[Path, Path]
) -> None:
    start, ranks, rows = federation.fresh(16, 3), [4, 16], [[0, 5], [9, 30]]
    states = [start.resized(rank, 3).state(2.0) for rank in ranks]
    rng = np.random.default_rng(0)
    for state in states:  # from B = 0, AdamW would make whole steps of rounding errors in A's gradient
        for name in state:
            state[name] = rng.normal(0, 0.3, state[name].shape).astype(np.float32)
    federation.wear(states)
    federation.local_steps([rows, rows], 1e-2, only_B=False)
    for client, rank in enumerate(ranks):
        own = alone(federation, places[0], states[client], rank, rows[client])
        learned = federation.undress(rank, client)
        assert learned.keys() == own.keys()
        for name, tensor in learned.items():
            np.testing.assert_allclose(tensor, own[name], rtol=1e-3, atol=2e-5, err_msg=name)
            moved = np.abs(tensor - states[client][name]).max()
            assert moved > 1e-3, f"{name} did not learn, so being equal says nothing"


def test_padding_stays_zero(federation: Any) -> None:
    states = [federation.fresh(16, 3).resized(rank).state(2.0) for rank in (4, 16)]
    federation.wear(states)
    federation.local_steps([[[0], [1]]] * 2, 1e-2, only_B=False)
    for layer in federation.layers.values():
        assert not layer.A_KRI[0, 4:].any()
        assert not layer.B_KOR[0, :, 4:].any()
        assert layer.B_KOR[1, :, 4:].any()


def test_a_fold_is_what_the_adapter_did_and_comes_out_again(federation: Any) -> None:
    bare = federation.fresh(8, 0)
    before = federation.evaluate(federation.test, bare.state(2.0))
    federation.wear([bare.state(2.0)])
    federation.local_steps([[[0, 1, 2, 3]]] * 3, 1e-2, only_B=False)
    state = federation.undress(8, 0)
    worn = federation.evaluate(federation.test, state)
    parsed = sys.modules["tightbeam.federation.math"].parse_adapter(state, 2.0, "one")
    federation.fold(parsed)
    assert federation.evaluate(federation.test, bare.state(2.0)) == pytest.approx(worn, abs=1e-5)
    assert worn != pytest.approx(before, abs=1e-3)
    federation.unfold()
    assert federation.evaluate(federation.test, bare.state(2.0)) == before


EXACT = ["flora-principal", "flora-fresh", "ffa-folded"]


@pytest.mark.parametrize("strategy", [*EXACT, "flexlora", "ffa", "hetlora", "zeropad", "fedit-8"])
def test_a_run_learns(bench: ModuleType, federation: Any, strategy: str) -> None:
    row = bench.run(federation, strategy, 0, 2e-2, rounds=2, steps=2, batch=2, clients=4)
    assert set(row["loss"]) == ({8} if strategy == "fedit-8" else {4, 8, 16})
    assert max(row["loss"].values()) < row["before"]
    assert (max(row["error"].values()) < 1e-4) == (strategy in EXACT)
    assert (len(set(row["loss"].values())) == 1) == (strategy in [*EXACT, "fedit-8"]), "whose weights differ"


def test_directions_that_a_client_folded_count_but_do_not_learn(federation: Any) -> None:
    """Worn without learning is what folding is: the same loss, the same gradients of what learns."""
    whole = federation.fresh(16, 3)
    rng = np.random.default_rng(0)
    for module in whole.modules.values():
        module.B_OR[:] = rng.normal(0, 0.1, module.B_OR.shape)
    results = []
    for folded in (False, True):
        federation.unfold()
        if folded:
            federation.fold(sys.modules["tightbeam.federation.math"].beyond(whole, 4))
            federation.wear([whole.resized(4).state(2.0)])
        else:
            federation.wear([whole.state(2.0)], [4])
        federation.local_steps([[[0, 1, 2]]] * 2, 1e-2, only_B=False)
        results.append(federation.undress(4, 0))
    start = whole.resized(4).state(2.0)
    for name, array in results[0].items():
        np.testing.assert_allclose(array, results[1][name], rtol=1e-3, atol=2e-5, err_msg=name)
        assert np.abs(array - start[name]).max() > 1e-3
    for layer in federation.layers.values():
        assert layer.A_KRI.shape[1] == 4


def test_what_crosses_once_in_mode_top_gives_the_same_losses(
    bench: ModuleType, places: tuple[Path, Path]
) -> None:
    whole, top = (bench.Federation(*places, "cpu", cut, 16) for cut in ("1:2", "0:2"))
    bare = [federation.fresh(8, 0).state(2.0) for federation in (whole, top)]
    one, other = whole.evaluate(whole.test, bare[0]), top.evaluate(top.test, bare[1])
    assert other == pytest.approx(one, abs=1e-6)
    assert len(bare[1]) < len(bare[0])
    assert len(top.model.model.layers) == 2


def test_topics_are_found_by_words(bench: ModuleType) -> None:
    texts = [
        " ".join(np.random.default_rng(n).permutation(WORDS[n % 3 * 2 :][:2])) + " the" for n in range(30)
    ]
    texts += ["unrelated filler"] * 20
    topics = bench.topics_of(texts, 4)
    assert all(topics[n] == topics[n % 3] for n in range(30))
    assert len(set(topics[:3])) == 3


def test_validation_is_nobody_s_training_and_no_test(bench: ModuleType, places: tuple[Path, Path]) -> None:
    whole = bench.Federation(*places, "cpu", "1:1", None)
    parts = [{tuple(ids) for ids, _ in part} for part in (whole.train, whole.validation, whole.test)]
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts)) == 480


def test_the_summary_keeps_search_and_table_apart(bench: ModuleType, tmp_path: Path) -> None:
    def line(seed: int, lr: float, test: float) -> dict[str, Any]:
        ranks = {"4": test, "16": test + 1}
        base = {"strategy": "flora", "before": 9, "rounds": 3, "steps": 2, "batch": 1}
        return base | {"seed": seed, "lr": lr, "loss": ranks, "error": ranks}

    rows = [line(100, 0.1, 0.0), line(100, 0.2, 0.5), line(1, 0.1, 2.0), line(0, 0.1, 4.0)]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = bench.summarise([path])
    assert found["losses"] == [4.5, 2.5]
    assert found["loss"] == 3.5
    assert found["seeds"] == [0, 1]
    assert found["search"] == {0.1: 0.5, 0.2: 1.0}
    cut_off = found | {"strategy": "zeropad", "losses": [2.5], "seeds": [1]}
    table = bench.table([found, cut_off])
    assert "| flora | 3.5000 | 4.5000 | 2.5000 | 3.0000 |  | 4.0000 | 3 / 4 | 0.5000 | 0.1 |" in table
    assert "| zeropad | 3.5000 |  | 2.5000 | 3.0000 |  |" in table, "a seed that did not run stays empty"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (only,) = bench.summarise([path])
    assert "| flora |  |  |  |  | - / - | 0.5000 | 0.1 |" in bench.table([only])


@pytest.mark.parametrize("name", ["mixed_ranks.jsonl", "mixed_ranks_top.jsonl"])
def test_the_table_of_the_docs_is_that_of_the_lines(bench: ModuleType, name: str) -> None:
    lines = (ROOT / "docs" / "data" / name).read_text(encoding="utf-8").splitlines()
    text = (ROOT / "docs" / "federation-math.md").read_text(encoding="utf-8")
    assert bench.table([json.loads(line) for line in lines]) in text
