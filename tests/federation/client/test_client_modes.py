"""A mode per client: a text crosses once in the whole experiment, and modes meet in one adapter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.edge_runs import byte_tokenizer
from support.federations import NUM_BLOCKS, Playground, spoiled
from tightbeam.common.errors import FederationError
from tightbeam.edge import connect
from tightbeam.edge.data import collate, load_examples
from tightbeam.edge.modes import MODES
from tightbeam.edge.side import Ladder
from tightbeam.federation.contract.layers import LADDER, fresh, layers_of
from tightbeam.federation.contract.records import from_record
from tightbeam.federation.scenario import Scenario

# 24 rows a client, 5 of them held out: five steps of four examples see each of the 19 others once.
EPOCH = {"steps": 5, "batch_size": 4}
LITTLE = {"taps": 2, "width": 8, "heads": 2}


def _crossed(playground: Playground, scenario: Scenario, kind: str) -> list[int]:
    """Wire bytes of activations of every round, over all clients."""
    totals: dict[int, int] = {}
    for row in playground.rows(scenario, kind):
        totals.setdefault(row["round"], 0)
        totals[row["round"]] += row["wire_up_bytes"] + row["wire_down_bytes"]
    return [totals[number] for number in sorted(totals)]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def _block(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _require_the_evaluated_model(
    playground: Playground, scenario: Scenario, name: str, side: str = "adapter"
) -> None:
    """What the server saved has, on the split model, the loss that a client of mode side reported."""
    folder, own = scenario.folder / "adapter", scenario.folder / "clients" / name / "eval.jsonl"
    examples = load_examples(own, byte_tokenizer(), max_length=48)
    (cut,) = (one.options.cut for one in scenario.profiles() if one.name == name)
    with connect(playground.address, insecure=True) as cloud:
        split = cloud.load_model(cut)
        model = peft.PeftModel.from_pretrained(split, folder)
        cloud.load_side(scenario.folder / side, model)
        with torch.no_grad():
            loss = float(model(**collate(examples, 0)).loss)
    rows = [r for r in playground.rows(scenario, "client_eval") if r["client"] == name]
    assert loss == pytest.approx(rows[-1]["loss"], rel=1e-5)
    assert loss != pytest.approx(rows[0]["loss"], rel=1e-4), "else an untrained one would do"


@pytest.mark.parametrize("freeze", [None, 1], ids=["top", "frozen"])
def test_every_text_crosses_once_and_no_bit_changes(playground: Playground, freeze: int | None) -> None:
    """In mode top from the start, in ushape once the bottom is frozen."""
    scenarios = [
        playground.scenario(
            rounds=3,
            eval_every=1,
            client={"mode": "ushape" if freeze else "top", "cut": "2:2", "cache_gb": max_gb},
            train={**EPOCH, "freeze_bottom_after": freeze},
            adapter={"dropout": 0.1},
        )
        for max_gb in (1.0, 0.0)
    ]
    for scenario in scenarios:
        playground.run(scenario)
    cached, fetched = scenarios
    assert _same(playground.state(cached), playground.state(fetched))
    assert [row["loss"] for row in playground.rows(cached, "evaluation")] == [
        row["loss"] for row in playground.rows(fetched, "evaluation")
    ]
    once, always = (_crossed(playground, one, "client_round") for one in scenarios)
    before = freeze or 0
    assert once[:before] == always[:before]
    assert 0 < once[before] <= always[before], "a cache fills in larger steps, which have rows in common"
    assert once[before + 1 :] == [0] * (2 - before)
    assert all(always)
    held_out = _crossed(playground, cached, "client_eval")  # of rounds 0 to 3
    assert all(held_out[: before + 1])
    assert held_out[before + 1 :] == [0] * (3 - before)
    report = playground.report(cached)
    assert [
        one["training"]["activation_up_bytes"] + one["training"]["activation_down_bytes"]
        for one in report["rounds"]
    ] == once


def test_a_client_trains_in_a_mode_that_was_added(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another name, mode top gives the same bits and crosses as often."""
    monkeypatch.setitem(MODES, "added", replace(MODES["top"], name="added"))
    scenarios = [playground.scenario(client={"mode": mode, "cut": "2:2"}) for mode in ("top", "added")]
    for scenario in scenarios:
        playground.run(scenario)
    top, added = scenarios
    assert _same(playground.state(top), playground.state(added))
    assert _crossed(playground, top, "client_round") == _crossed(playground, added, "client_round")


def test_a_client_that_missed_rounds_fetches_what_it_lacks(playground: Playground) -> None:
    """With a sample of two, batches hold what was seen and what was not; each text crosses once."""
    scenario = playground.scenario(
        rounds=5, sample=2, client={"mode": "top"}, train={"steps": 3, "batch_size": 4}
    )
    playground.run(scenario)
    width = playground.rows(scenario, "experiment")[0]["backbone"]["hidden_size"]
    seen_again = False
    for profile in scenario.profiles():
        rows = [r for r in playground.rows(scenario, "client_round") if r["client"] == profile.name]
        path = scenario.folder / "clients" / profile.name / "train.jsonl"
        everything = sum(len(e.input_ids) for e in load_examples(path, byte_tokenizer(), max_length=48))
        crossed = sum(r["payload_up_bytes"] + r["payload_down_bytes"] for r in rows)
        assert crossed <= 2 * 4 * width * everything  # up and down in float32
        seen_again |= sum(r["tokens"] for r in rows) > everything
    assert seen_again, "else it could not cross twice"


def test_a_frozen_bottom_is_a_step_of_the_top_alone(playground: Playground, backbone: Path) -> None:
    """Plain SGD on all examples at once: the second round is one central step that leaves block 0 alone."""
    lr, scale = 0.5, 2.0
    scenario = playground.scenario(
        train={
            "steps": 1, "batch_size": 64, "lr": lr, "optimizer": "sgd", "max_grad_norm": 0,
            "freeze_bottom_after": 1,
        },
        strategy={"weight": "tokens"},
    )  # fmt: skip
    playground.run(scenario)
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    linear = "self_attn.[qkvo]_proj|mlp.(?:gate|up|down)_proj"
    targets = rf"model\.layers\.(?:0|{NUM_BLOCKS - 1})\.(?:{linear})"
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=int(scale * 4), target_modules=targets)
    )
    before, after = playground.state(scenario, 1), playground.state(scenario, 2)
    start = {
        name.removeprefix("global/learned/"): torch.from_numpy(
            array / (scale if ".lora_B." in name else 1)
        ).float()
        for name, array in before.items()
    }
    peft.set_peft_model_state_dict(adapted, start)
    paths = sorted(scenario.folder.glob("clients/*/train.jsonl"))
    examples = [e for path in paths for e in load_examples(path, byte_tokenizer(), max_length=48)]
    adapted(**collate(examples, 0)).loss.backward()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.grad is not None and _block(name) == NUM_BLOCKS - 1:
                parameter -= lr * parameter.grad
    central = peft.get_peft_model_state_dict(adapted)
    for name, array in after.items():
        plain = name.removeprefix("global/learned/")
        moved = not np.array_equal(array, before[name])
        assert moved == (_block(name) == NUM_BLOCKS - 1), name
        expected = central[plain].double() * (scale if ".lora_B." in name else 1)
        assert np.linalg.norm(array - expected.numpy()) <= 1e-6 * np.linalg.norm(expected.numpy()), name
    up = [row["adapter_up_bytes"] for row in playground.rows(scenario, "client_round")]
    assert up[3:] == [up[0] // 2] * 3, "the bottom is not handed in any more"


@pytest.mark.parametrize("strategy", ["fedit", "ffa"])
def test_a_laptop_in_side_beside_a_gpu_box_in_ushape(playground: Playground, strategy: str) -> None:
    """They share the outer blocks; the inner ones are the box's alone, and the ladder is the laptops'."""
    handed_in: dict[str, dict[str, Any]] = {}

    def record(client: int, reply: Message) -> None:
        if reply.has_content() and (arrays := reply.content.array_records.get("arrays")):
            weight = reply.content.metric_records["metrics"]["weight"]
            handed_in[str(client)] = {"weight": weight, **from_record(arrays)}

    scenario = playground.scenario(
        rounds=1,
        client={"mode": "side", "cut": "1:1", "side": LITTLE},
        groups={"gpu-box": {"clients": 1, "mode": "ushape", "cut": "2:2"}},
        strategy={"name": strategy},
        partition={"by": "size"},
    )
    playground.run_with(scenario, spoiled(record))
    state = {n.removeprefix("global/learned/"): a for n, a in playground.state(scenario).items()}
    ladder = {name for name in state if name.startswith(LADDER)}
    layers = {name: _block(name) for name in state.keys() - ladder}
    assert set(layers.values()) == {0, 1, NUM_BLOCKS - 2, NUM_BLOCKS - 1}
    assert {n for n in handed_in["0"] if n.startswith(LADDER)} == set()
    laptops = [handed_in["1"], handed_in["2"]]
    total = sum(one["weight"] for one in laptops)
    for name in ladder:
        mean = sum(one[name].astype(np.float64) * one["weight"] for one in laptops) / total
        assert np.allclose(state[name], mean, rtol=1e-12, atol=0), name
        assert state[name].shape == laptops[0][name].shape
    alone = next(name for name, block in layers.items() if block == 1 and ".lora_B." in name)
    assert np.array_equal(state[alone], handed_in["0"][alone].astype(np.float64) * 2.0)
    assert any(array.any() for name, array in state.items() if ".leave." in name)
    _require_the_evaluated_model(playground, scenario, "client-01")


def test_side_learns_with_a_cache_and_leaves_a_network_that_loads(playground: Playground) -> None:
    scenario = playground.scenario(
        rounds=2,
        client={"mode": "side", "cut": "2:2", "side": LITTLE},
        train=EPOCH,
        strategy={"name": "fedavgm"},
    )
    playground.run(scenario)
    losses = [row["loss"] for row in playground.rows(scenario, "evaluation")]
    assert losses[-1] < losses[0] - 0.01
    assert _crossed(playground, scenario, "client_round")[1:] == [0]
    folder = scenario.folder / "clients" / "client-00" / "adapter"
    saved, state = load_file(folder / "side.safetensors"), playground.state(scenario)
    for name, tensor in saved.items():
        (full,) = (n for n in state if n.startswith(f"global/learned/{LADDER}") and n.endswith(f".{name}"))
        assert torch.equal(tensor, torch.from_numpy(state[full]).float()), name
    _require_the_evaluated_model(playground, scenario, "client-00")


def test_ladders_of_different_kinds_never_mix(playground: Playground) -> None:
    scenario = playground.scenario(
        rounds=1,
        client={"mode": "side", "cut": "1:1", "side": LITTLE},
        groups={"wide": {"clients": 1, "side": {**LITTLE, "width": 12}}},
    )
    playground.run(scenario)
    kinds = {tuple(name.split(".")[1:3]) for name in playground.state(scenario) if f"/{LADDER}" in name}
    assert len(kinds) == 2
    widths = {}
    for _, digest in kinds:
        plan = json.loads((scenario.folder / f"adapter/side-1-1-{digest}/side.json").read_text("utf-8"))
        widths[plan["width"]] = f"adapter/side-1-1-{digest}"
    assert not (scenario.folder / "adapter" / "side.json").exists(), "of which of them?"
    for name, width in (("client-00", 12), ("client-01", 8)):
        _require_the_evaluated_model(playground, scenario, name, widths[width])


def test_a_local_ladder_is_not_in_the_servers_folder(playground: Playground) -> None:
    scenario = playground.scenario(rounds=1, client={"mode": "side", "share": "top", "side": LITTLE})
    playground.run(scenario)
    assert not list((scenario.folder / "adapter").rglob("side*"))
    assert (scenario.folder / "clients" / "client-00" / "adapter" / "side.json").exists()


def test_a_layer_on_both_sides_of_a_cut_cannot_be_frozen(playground: Playground) -> None:
    overlapping = playground.scenario(
        client={"cut": "4:1"}, groups={"a": {"clients": 1, "cut": "1:3"}}, train={"freeze_bottom_after": 1}
    )
    with pytest.raises(FederationError, match=r"layers\.3\..* is below the cut of client-0[12] and above"):
        playground.run(overlapping)


def test_a_fresh_ladder_is_drawn_as_a_ladder_draws_itself() -> None:
    torch.manual_seed(0)
    ladder = Ladder(hidden_size=32, taps=(2, 3), tap_size=4, width=8, heads=2)
    shapes = {f"{LADDER}2:2.x.{name}": tuple(p.shape) for name, p in ladder.named_parameters()}
    drawn = fresh(layers_of(shapes, "test"), 0, seed=1).rest
    assert drawn.keys() == shapes.keys()
    for name, parameter in ladder.named_parameters():
        own, ours = parameter.detach().numpy(), drawn[f"{LADDER}2:2.x.{name}"]
        assert ours.shape == own.shape
        if own.ndim == 2 and own.any():
            bound = 1 / np.sqrt(own.shape[1])
            assert max(abs(own).max(), abs(ours).max()) <= bound
            assert min(abs(own).max(), abs(ours).max()) > 0.7 * bound, name
        else:
            assert np.array_equal(ours, own), name


def test_a_budget_lasts_longer_with_a_cache(playground: Playground) -> None:
    """One round of activations fits; what is cached needs no second one, and what is not degrades or ends."""
    base = {"rounds": 3, "train": EPOCH}
    client = {"mode": "top", "cut": "2:2"}
    free = playground.scenario(**base, client=client)
    playground.run(free)
    first = playground.rows(free, "client_round")[0]
    spent = sum(first[f"wire_{d}_bytes"] + first[f"adapter_{d}_bytes"] for d in ("up", "down"))
    evaluated = [r for r in playground.rows(free, "client_eval") if r["client"] == first["client"]]
    fixed = evaluated[0]["weight_bytes"] + sum(
        r["wire_up_bytes"] + r["wire_down_bytes"] + r["adapter_down_bytes"] for r in evaluated
    )
    adapters = 3 * (first["adapter_up_bytes"] + 2 * first["adapter_down_bytes"])
    mb = (fixed + spent * 1.3 + adapters) / 1e6
    statuses = {}
    for max_gb in (1.0, 0.0):
        tight = playground.scenario(**base, client={**client, "cache_gb": max_gb, "budget": {"mb": mb}})
        playground.run(tight)
        rows = playground.rows(tight, "client_round")
        statuses[max_gb] = [r["status"] for r in rows if r["client"] == first["client"]]
    assert statuses[1.0] == ["ok"] * 3
    assert "left" in statuses[0.0]
