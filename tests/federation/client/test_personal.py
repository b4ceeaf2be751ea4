"""Personal mode: what is not shared stays at the client, to the last bit and across kills."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from support.edge_runs import byte_tokenizer
from support.federations import NUM_BLOCKS, Playground
from tightbeam.edge import connect
from tightbeam.edge.data import collate, load_examples
from tightbeam.federation.client import AdapterShape, CachePlace, Lender, LocalTask, Workplace
from tightbeam.federation.client.personal import PersonalPart
from tightbeam.federation.contract.layers import fresh, layers_of
from tightbeam.federation.scenario import ClientProfile, Scenario
from tightbeam.simulations.client_app import app

SGD = {"optimizer": "sgd", "lr": 0.3, "max_grad_norm": 0}


def _own(scenario: Scenario, profile: ClientProfile, number: int) -> dict[str, np.ndarray]:
    folder = scenario.folder / "clients" / profile.name / "personal"
    arrays: dict[str, np.ndarray] = load_file(folder / f"round-{number}.safetensors")
    return arrays


def _recorded(seen: list[tuple[str, set[str]]]) -> Any:
    """The real client app; notes the names of all arrays that go in and out."""

    def call(message: Message, context: Context) -> Message:
        reply = app(message, context)
        for which in (message, reply):
            for record in which.content.array_records.values():
                assert isinstance(record, ArrayRecord)
                seen.append((message.metadata.message_type, set(record)))
        return reply

    return call


def _alone(playground: Playground, scenario: Scenario, profile: ClientProfile) -> dict[str, np.ndarray]:
    """All of a client's steps in one go, without any federation."""
    train, draw = scenario.train, random.Random(f"{scenario.seed}/order/0/{profile.name}")
    shape = AdapterShape("1:1", "ushape", 4, 2.0)
    task = LocalTask(
        steps=train.steps * scenario.rounds, batch_size=train.batch_size, lr=train.lr, optimizer="sgd",
        max_grad_norm=0, proximal=0, first_step=0, order_seed=draw.randrange(2**31), dropout_seed=0,
    )  # fmt: skip
    with connect(playground.address, insecure=True, name="alone") as cloud:
        lent = Lender().lend(cloud, shape, "auto")
        place = Workplace(
            lent=lent, shape=shape, fingerprint=cloud.card.fingerprint, pad_id=0,
            cache=CachePlace(playground.folder, None, 0),
        )  # fmt: skip
        lent.wear(fresh(layers_of(lent.layers(), "alone"), 4, scenario.seed).state(2.0))
        path = scenario.folder / "clients" / profile.name / "train.jsonl"
        place.train(load_examples(path, byte_tokenizer(), max_length=48), task, [])
        return lent.arrays()


def test_nothing_shared_is_each_client_alone(playground: Playground) -> None:
    seen: list[tuple[str, set[str]]] = []
    scenario = playground.scenario(rounds=2, client={"share": "none"}, train=SGD)
    playground.run_with(scenario, _recorded(seen))
    assert all(not names for _, names in seen)
    assert {kind for kind, _ in seen} == {"train", "evaluate"}
    for profile in scenario.profiles():
        together, alone = _own(scenario, profile, 2), _alone(playground, scenario, profile)
        assert together.keys() == alone.keys()
        assert all(np.array_equal(together[name], alone[name]) for name in alone), profile.name
    assert not (scenario.folder / "adapter").exists(), "there is no common result"
    assert playground.rows(scenario, "round")[-1]["notes"] == ["nothing is shared"]


@pytest.mark.parametrize("strategy", ["ffa", "fedadam"])
def test_the_bottom_never_travels(playground: Playground, strategy: str) -> None:
    seen: list[tuple[str, set[str]]] = []
    scenario = playground.scenario(
        client={"share": "top"}, strategy={"name": strategy, "server_lr": 1e-2}, train={"lr": 3e-2}
    )
    playground.run_with(scenario, _recorded(seen))
    travelled = {name for _, names in seen for name in names}
    assert travelled
    assert all(f".layers.{NUM_BLOCKS - 1}." in name for name in travelled)
    assert {n.split(".layers.")[1].split(".")[0] for n in playground.state(scenario)} == {str(NUM_BLOCKS - 1)}
    own = [_own(scenario, profile, 2) for profile in scenario.profiles()]
    assert all(".layers.0." in name for name in own[0])
    assert any(not np.array_equal(own[0][name], own[1][name]) for name in own[0]), "they differ"


def test_the_recorder_would_see_a_bottom(playground: Playground) -> None:
    seen: list[tuple[str, set[str]]] = []
    playground.run_with(playground.scenario(rounds=1), _recorded(seen))
    assert any(".layers.0." in name for _, names in seen for name in names)


def test_the_evaluated_model_is_the_saved_one(playground: Playground, backbone: Path) -> None:
    """Own bottom and shared top, opened by stock PEFT on the whole model, have the reported loss."""
    scenario = playground.scenario(client={"share": "top"}, train={"lr": 3e-2})
    playground.run(scenario)
    reported = {r["client"]: r["loss"] for r in playground.rows(scenario, "client_eval") if r["round"] == 2}
    found = []
    for profile in scenario.profiles():
        folder = scenario.folder / "clients" / profile.name
        model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
        trained = peft.PeftModel.from_pretrained(model, folder / "adapter")
        examples = load_examples(folder / "eval.jsonl", byte_tokenizer(), max_length=48)
        with torch.no_grad():
            found.append(float(trained(**collate(examples, 0)).loss))
        assert found[-1] == pytest.approx(reported[profile.name], rel=1e-5)
    one, other = (load_file(f / "adapter_model.safetensors") for f in _adapters(scenario)[:2])
    differing = {n.split(".layers.")[1].split(".")[0] for n in one if not np.array_equal(one[n], other[n])}
    assert differing == {"0"}
    assert (scenario.folder / "adapter" / "adapter_config.json").is_file(), "the shared top"
    assert "1:1, 4; shares top" in (scenario.folder / "report.html").read_text(encoding="utf-8")


def _adapters(scenario: Scenario) -> list[Path]:
    return [scenario.folder / "clients" / profile.name / "adapter" for profile in scenario.profiles()]


def test_killed_and_resumed_equals_uninterrupted(playground: Playground) -> None:
    """Killed as soon as one client has finished its part of a round, which is then done again."""
    changes: dict[str, Any] = {"rounds": 3, "client": {"share": "top"}}
    whole, cut_off = playground.scenario(**changes), playground.scenario(**changes)
    playground.run(whole)
    playground.run_and_kill(cut_off, after="clients/client-00/personal/round-2.safetensors")
    playground.run(cut_off, resume=True)
    for left, right in zip(_adapters(whole), _adapters(cut_off), strict=True):
        one, other = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_round_starts_from_what_was_there_before_it(tmp_path: Path) -> None:
    part = PersonalPart(tmp_path / "personal")
    assert part.before(1) is None
    for number in (1, 4, 9):
        part.save(number, {"a": np.full((), float(number), np.float32)})
    started = {number: part.before(number) for number in (5, 9, 10)}
    assert {n: float(found["a"]) for n, found in started.items() if found} == {5: 4.0, 9: 4.0, 10: 9.0}
    assert part.before(4) is None, "older ones are gone"
    assert part.before(10)["a"].shape == ()  # type: ignore[index]  # it is there
