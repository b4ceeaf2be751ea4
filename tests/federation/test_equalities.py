"""A federation against what it must equal: central training, itself, and the model that PEFT opens."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.edge_runs import byte_tokenizer
from support.federations import NUM_BLOCKS, Playground
from tightbeam.edge.data import Example, collate, load_examples
from tightbeam.federation.scenario import Scenario

LR, SCALE = 0.5, 2.0


def _local(backbone: Path) -> peft.PeftModel:
    """The whole model with adapters on the first and the last block, as cut 1:1 has them."""
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    linear = "self_attn.[qkvo]_proj|mlp.(?:gate|up|down)_proj"
    targets = rf"model\.layers\.(?:0|{NUM_BLOCKS - 1})\.(?:{linear})"
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=int(SCALE * 4), target_modules=targets))


def _wear(model: peft.PeftModel, state: dict[str, np.ndarray]) -> None:
    tensors = {}
    for name, array in state.items():
        scale = SCALE if ".lora_B." in name else 1.0
        tensors[name.removeprefix("global/learned/")] = torch.from_numpy(array / scale).float()
    peft.set_peft_model_state_dict(model, tensors)


def _texts(scenario: Scenario, backbone: Path, which: str) -> list[Example]:
    paths = sorted(scenario.folder.glob(f"clients/*/{which}.jsonl"))
    return [e for path in paths for e in load_examples(path, byte_tokenizer(), max_length=48)]


def test_a_round_of_one_step_equals_one_central_step(playground: Playground, backbone: Path) -> None:
    """Plain SGD, all examples of all clients in one batch: two rounds are two central steps."""
    scenario = playground.scenario(
        train={"steps": 1, "batch_size": 64, "lr": LR, "optimizer": "sgd", "max_grad_norm": 0},
        strategy={"weight": "tokens"},
        partition={"by": "size"},
    )
    playground.run(scenario)
    model = _local(backbone)
    _wear(model, playground.state(scenario, 1))
    first = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    batch = collate(_texts(scenario, backbone, "train"), 0)
    model(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LR * parameter.grad
    central = peft.get_peft_model_state_dict(model)
    for name, array in playground.state(scenario, 2).items():
        plain = name.removeprefix("global/learned/")
        federated = torch.from_numpy(array / (SCALE if ".lora_B." in name else 1.0))
        moved = central[plain].double() - first[plain.replace(".weight", ".default.weight")].double()
        assert moved.norm() > 0, name
        error = (federated - central[plain].double()).norm() / central[plain].double().norm()
        assert error < 1e-6, (name, float(error))


def test_two_runs_of_one_seed_are_bit_equal_and_another_seed_is_not(playground: Playground) -> None:
    changes = {"sample": 2, "adapter": {"dropout": 0.1}, "partition": {"by": "dirichlet", "alpha": 1.0}}
    one, two, other = (playground.scenario(**changes, seed=seed) for seed in (0, 0, 1))
    for scenario in (one, two, other):
        playground.run(scenario)
    first, second, third = map(playground.state, (one, two, other))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert any(not np.array_equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize("strategy", [{"name": "flora"}, {"name": "fedavgm", "momentum": 0.5}], ids=str)
def test_killed_and_resumed_equals_uninterrupted(playground: Playground, strategy: dict[str, object]) -> None:
    whole = playground.scenario(rounds=3, strategy=strategy)
    cut_off = playground.scenario(rounds=3, strategy=strategy)
    playground.run(whole)
    playground.run_and_kill(cut_off)
    assert not (cut_off.folder / "report.html").exists()
    playground.run(cut_off, resume=True)
    left, right = playground.state(whole), playground.state(cut_off)
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)
    assert [row["round"] for row in playground.rows(cut_off, "round")] == [1, 2, 3]


@pytest.mark.parametrize(
    "strategy", [{"name": "fedit"}, {"name": "flora"}, {"name": "flora", "restart": "fresh"}], ids=str
)
def test_the_saved_adapter_on_the_whole_model_has_the_reported_loss(
    playground: Playground, backbone: Path, strategy: dict[str, object]
) -> None:
    """PEFT opens the result; what was folded into the edges' weights is in it too, whatever their rank."""
    groups = {} if strategy["name"] == "fedit" else {"narrow": {"clients": 1, "r": 2}}
    scenario = playground.scenario(strategy=strategy, groups=groups, train={"lr": 3e-2})
    playground.run(scenario)
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    trained = peft.PeftModel.from_pretrained(model, scenario.folder / "adapter")
    examples = _texts(scenario, backbone, "eval")
    batch = collate(examples, 0)
    with torch.no_grad():
        loss = float(trained(**batch).loss)
        untrained = float(_local(backbone)(**batch).loss)
    reported = playground.rows(scenario, "evaluation")[-1]["loss"]
    assert loss == pytest.approx(reported, rel=1e-5)
    assert loss < untrained - 0.01
