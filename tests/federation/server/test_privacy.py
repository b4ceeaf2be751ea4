"""Differential privacy: updates are bounded, noise has its std, and epsilon is what the library says."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from flwr.app import Context, Message, MetricRecord, RecordDict

from support.federations import Playground, Signed, losing_texts
from support.secure_nodes import SecureNodes, secure_scenario
from tightbeam.common.errors import RecipeError
from tightbeam.federation.contract.records import from_record, to_record
from tightbeam.federation.math import Update, parse_adapter
from tightbeam.federation.math.privacy import length
from tightbeam.federation.runtimes.grid import InProcessGrid
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.federation.server.combining import Accepted, ByPrivateFlower
from tightbeam.federation.server.global_adapter import GlobalAdapter
from tightbeam.federation.server.privacy import Accounting, adaptive_multiplier, private_strategy
from tightbeam.federation.server.secure import SecureRounds, SecureSum
from tightbeam.simulations.client_app import app

Z, NORM = 1.5, 0.2
SHAPES = {"m.layers.0.q.lora_A.weight": (2, 4000), "m.layers.0.q.lora_B.weight": (3000, 2)}


def _scenario(clients: int = 4, name: str = "fedit", **privacy: Any) -> Scenario:
    section = {"noise_multiplier": Z, "clipping_norm": NORM, **privacy}
    strategy = {"name": name, "weight": "equal", "privacy": section}
    return scenario_from_mapping({"clients": clients, "rounds": 3, "strategy": strategy, "client": {"r": 2}})


def _accounting(scenario: Scenario) -> Accounting:
    assert scenario.strategy.privacy is not None
    return Accounting(scenario, scenario.strategy.privacy)


def _reference(multiplier: float, rounds: int, delta: float = 1e-5) -> float:
    """Google's accountant, asked directly."""
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_event.GaussianDpEvent(multiplier), rounds)
    return float(accountant.get_epsilon(delta))


# ------------------------------------------------------------------------------------------ epsilon


@pytest.mark.parametrize("multiplier", [0.5, 1.5, 4.0])
def test_epsilon_is_the_librarys_and_grows_with_every_round(multiplier: float) -> None:
    accounting = _accounting(_scenario(noise_multiplier=multiplier))
    assert accounting.epsilon == 0.0
    seen = []
    for rounds in (1, 2, 3):
        accounting.release(multiplier)
        seen.append(accounting.epsilon)
        assert accounting.epsilon == pytest.approx(_reference(multiplier, rounds), rel=1e-9)
    assert seen == sorted(set(seen))


def test_epsilon_is_near_the_formula_of_one_gaussian() -> None:
    """By hand: least over orders a of a / (2 z^2) + ln(1 / delta) / (a - 1); the library is a bit sharper."""
    accounting = _accounting(_scenario())
    accounting.release(Z)
    by_hand = min(a / (2 * Z**2) + math.log(1e5) / (a - 1) for a in np.linspace(1.1, 60, 5000))
    assert 0.8 * by_hand < accounting.epsilon <= by_hand


def test_a_restart_counts_the_round_that_was_cut_off() -> None:
    accounting, again = (_accounting(_scenario()) for _ in "ab")
    for _ in range(2):
        accounting.release(Z)
    again.remember(accounting.memory())
    assert again.epsilon == pytest.approx(_reference(Z, 3))


def _amplified(sampled: int, clients: int, rounds: int, multiplier: float) -> float:
    """Fixed-size samples that nobody knows; replacing a client's texts moves a sum by two norms, not one."""
    relation = rdp.rdp_privacy_accountant.NeighborRel.REPLACE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    event = dp_event.SampledWithoutReplacementDpEvent(
        clients, sampled, dp_event.GaussianDpEvent(multiplier / 2)
    )
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(1e-5))


def test_the_table_of_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "federation-math.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) of (\d+), (\d+) rounds \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.M)
    assert len(rows) >= 4
    for sampled, clients, rounds, multiplier, plain, amplified in rows:
        assert float(plain) == pytest.approx(_reference(float(multiplier), int(rounds)), abs=0.06)
        found = _amplified(int(sampled), int(clients), int(rounds), float(multiplier))
        assert float(amplified) == pytest.approx(found, abs=0.06)


# --------------------------------------------------------------------------------- clipping and noise


def _start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: 0.1 * rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def _round(scenario: Scenario, changes: list[float], accounting: Accounting) -> tuple[Any, Any]:
    """What a private round makes of updates of these lengths, and what the mean would have been."""
    grid = InProcessGrid(app, scenario.clients, {})
    combiner, start = ByPrivateFlower(scenario, accounting), _start()
    combiner.prepare(1, to_record(start), scenario.sampled, grid)
    state = GlobalAdapter(parse_adapter(start, 2.0, "start"))
    accepted, mean = [], {name: array.astype(np.float64) for name, array in start.items()}
    for number, size in enumerate(changes):
        rng = np.random.default_rng(number + 1)
        step = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        scale = size / length(step)
        arrays = {name: (start[name] + scale * step[name]).astype(np.float32) for name in start}
        if scenario.strategy.name == "ffa":
            arrays = {name: array for name, array in arrays.items() if ".lora_B." in name}
        moved = length({name: arrays[name] - start[name] for name in arrays})
        shrink = NORM / moved if moved > NORM else 1.0
        for name in arrays:
            mean[name] += shrink * (arrays[name] - start[name]) / len(changes)
        metrics = MetricRecord({"weight": 1, "norm_bit": int(shrink < 1)})
        reply = Message(RecordDict({"arrays": to_record(arrays), "metrics": metrics}), 1, "train")
        accepted.append(Accepted(Update(f"c{number}", 1, arrays, 2.0), frozenset(), reply))
    after = combiner.combine(1, state, accepted).state.learned.state(2.0)
    return {name: after[name] - mean[name] for name in SHAPES}, combiner


@pytest.mark.parametrize("there", [4, 3])
def test_the_mean_of_clipped_updates_has_noise_of_the_right_std(there: int) -> None:
    """z C / n for those who are there; updates of twenty times the norm do not show."""
    scenario = _scenario()
    accounting = _accounting(scenario)
    noise, _ = _round(scenario, [20 * NORM, 0.5 * NORM, 5 * NORM, NORM][:there], accounting)
    flat = np.concatenate([array.ravel() for array in noise.values()])
    assert flat.std() == pytest.approx(Z * NORM / there, rel=0.03)
    assert abs(flat.mean()) < 4 * flat.std() / math.sqrt(flat.size)
    assert accounting.epsilon == pytest.approx(_reference(Z, 1))


def test_an_update_in_which_nothing_moved_is_no_reason_to_stop() -> None:
    """Flower's own clipping divides by its length."""
    noise, _ = _round(_scenario(), [0.0, NORM, NORM, NORM], _accounting(_scenario()))
    flat = np.concatenate([array.ravel() for array in noise.values()])
    assert flat.std() == pytest.approx(Z * NORM / 4, rel=0.03)


def test_with_ffa_noise_falls_on_b_alone() -> None:
    noise, _ = _round(_scenario(name="ffa"), [NORM] * 4, _accounting(_scenario()))
    assert np.abs(noise["m.layers.0.q.lora_A.weight"]).max() < 1e-6
    assert noise["m.layers.0.q.lora_B.weight"].std() == pytest.approx(Z * NORM / 4, rel=0.05)


@pytest.mark.parametrize("where", ["server", "client"])
def test_the_adaptive_norm_follows_the_updates_and_its_noise_is_counted(where: str) -> None:
    scenario = _scenario(clients=40, clipping="adaptive", where=where)
    accounting = _accounting(scenario)
    _, combiner = _round(scenario, [0.1 * NORM] * 40, accounting)
    norm = float(combiner.memory()["clipping_norm"])
    assert norm < NORM, "nobody was clipped, so the norm falls"
    _, clipped = _round(scenario, [9 * NORM] * 40, _accounting(scenario))
    assert float(clipped.memory()["clipping_norm"]) > NORM, "all were clipped, so it rises"
    # What Flower spends on the count, and that it scales the noise by the new norm, cost epsilon.
    assert _reference(Z, 1) < accounting.epsilon < 1.3 * _reference(Z, 1)
    other = ByPrivateFlower(scenario, accounting)
    other.remember(combiner.memory())
    assert float(other.memory()["clipping_norm"]) == norm


def test_without_a_change_of_norm_the_two_noises_make_the_one_that_was_asked() -> None:
    scenario = _scenario(clients=40, clipping="adaptive")
    strategy: Any = private_strategy(scenario, _accounting(scenario))
    assert strategy.noise_multiplier > Z
    assert adaptive_multiplier(strategy, strategy.clipping_norm) == pytest.approx(Z)


# ------------------------------------------------------------------------------------------ whole runs


def _watching(sent: list[dict[str, float]]) -> Any:
    """The real client app; how long each update is that leaves a node."""

    def call(message: Message, context: Context) -> Message:
        start = from_record(message.content.array_records.get("arrays", to_record({})))
        reply = app(message, context)
        if reply.has_content() and (record := reply.content.array_records.get("arrays")):
            arrays = from_record(record)
            sent.append({"length": length({n: arrays[n] - start[n] for n in arrays}), "count": len(arrays)})
        return reply

    return call


@pytest.mark.parametrize("clipping", ["fixed", "adaptive"])
def test_what_leaves_a_client_is_clipped_by_flowers_mod(playground: Playground, clipping: str) -> None:
    multiplier = 0.25 if clipping == "adaptive" else 1.0
    privacy = {"noise_multiplier": multiplier, "clipping_norm": 0.05, "where": "client", "clipping": clipping}
    train = {"lr": 2e-2, "steps": 2}
    sent: list[dict[str, float]] = []
    free: list[dict[str, float]] = []
    playground.run_with(playground.scenario(train=train), _watching(free))
    scenario = playground.scenario(train=train, strategy={"weight": "equal", "privacy": privacy})
    playground.run_with(scenario, _watching(sent))
    assert min(one["length"] for one in free) > 0.1, "the control: left alone, updates are longer"
    first, second = sent[:3], sent[3:]
    assert [one["length"] for one in first] == pytest.approx([0.05] * 3, rel=1e-3)
    if clipping == "adaptive":  # all three were clipped, and the count has its own noise
        assert second[0]["length"] != pytest.approx(0.05, rel=1e-3)
        assert {row["norm_bit"] for row in playground.rows(scenario, "client_round")} == {1}
    epsilons = [row["epsilon"] for row in playground.rows(scenario, "round")]
    assert 0 < epsilons[0] < epsilons[1]


def test_epsilon_is_printed_and_reported_for_each_round(playground: Playground) -> None:
    privacy = {"noise_multiplier": 1.0, "clipping_norm": 0.05, "delta": 1e-4}
    scenario = playground.scenario(strategy={"name": "ffa", "weight": "equal", "privacy": privacy})
    printed = playground.run(scenario)
    report = playground.report(scenario)
    expected = [_reference(1.0, rounds, 1e-4) for rounds in (1, 2)]
    assert [one["epsilon"] for one in report["rounds"]] == pytest.approx(expected)
    assert report["privacy"]["epsilon"] == pytest.approx(expected[1])
    assert report["privacy"]["delta"] == 1e-4
    for epsilon in expected:
        assert f"epsilon {epsilon:.3f} at 0.0001" in printed
    page = (scenario.folder / "report.html").read_text(encoding="utf-8")
    assert f"&epsilon; = {expected[1]:.2f}" in page
    assert "The server is trusted" in page


class Killed(Exception):  # noqa: N818  no error of the code's
    """The server dies."""


def _killed_in(number: int) -> Any:
    """The real client app; at the first training of this round everything ends."""

    def call(message: Message, context: Context) -> Message:
        asked = message.content.config_records if message.metadata.message_type == "train" else {}
        if asked and asked["config"]["server-round"] == number:
            raise Killed
        return app(message, context)

    return call


def test_a_killed_run_goes_on_counting_where_it_was(playground: Playground) -> None:
    privacy = {"noise_multiplier": 1.0, "clipping_norm": 0.05}
    scenario = playground.scenario(rounds=3, strategy={"weight": "equal", "privacy": privacy})
    with pytest.raises(Killed):
        playground.run_with(scenario, _killed_in(3))
    playground.run(scenario, resume=True)
    epsilons = [row["epsilon"] for row in playground.rows(scenario, "round")]
    expected = [_reference(1.0, 1), _reference(1.0, 2), _reference(1.0, 4)]
    assert epsilons == pytest.approx(expected), "the round that was cut off counts, too"


@pytest.mark.parametrize("has_the_sum", [False, True])
def test_a_killed_secure_run_goes_on_with_fresh_keys(signed: Signed, has_the_sum: bool) -> None:
    """Also where clients have consented to the sum: for the same cohort they do so again."""
    changes: dict[str, Any] = {"clients": 3, "rounds": 2, "strategy": {"secure": True}}
    whole, cut_off = signed.run(**changes), signed.scenario(**changes)
    close, sums = SecureRounds.close, list[SecureSum]()

    def killed_with_it(self: SecureRounds, masked: dict[str, bytes]) -> SecureSum:
        sums.append(close(self, masked))
        if len(sums) == 3:  # before the first round an evaluation
            raise Killed
        return sums[-1]

    client = app if has_the_sum else _killed_in(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecureRounds, "close", killed_with_it if has_the_sum else close)
        with pytest.raises(Killed):
            signed.playground.run_with(cut_off, client)
    signed.playground.run(cut_off, resume=True)
    left, right = signed.playground.state(whole), signed.playground.state(cut_off)
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_a_client_that_fails_keeps_its_own_words_under_flowers_mod(playground: Playground) -> None:
    privacy = {"noise_multiplier": 1.0, "clipping_norm": 0.05, "where": "client"}
    scenario = playground.scenario(rounds=1, strategy={"weight": "equal", "privacy": privacy})
    playground.run_with(scenario, losing_texts(scenario, "client-02"))
    row = playground.rows(scenario, "client_round")[2]
    assert row["status"] == "failed"
    assert "train.jsonl" in row["reason"]
    assert playground.rows(scenario, "round")[0]["updates"] == 2


# ------------------------------------------------------------------------------------- secure and private


def test_in_a_secure_round_the_clients_noise_makes_the_sum_private(certs: Path, tmp_path: Path) -> None:
    """Fewest survivors (threshold 3 of 5): their parts make z C; with all five there is more."""
    privacy = {"noise_multiplier": Z, "clipping_norm": NORM, "where": "client"}
    scenario = secure_scenario(5, weight="equal", privacy=privacy)
    start = _start()
    updates = {}
    for number in range(5):
        rng = np.random.default_rng(number)
        updates[f"client-{number:02d}"] = {n: a + rng.normal(size=a.shape) for n, a in start.items()}
    for gone in ((), ("client-01", "client-03")):
        weights, folder = dict.fromkeys(updates, 1), tmp_path / f"{len(gone)}-gone"
        nodes = SecureNodes(
            scenario, certs, folder, updates=updates, weights=weights, gone=set(gone), start=start
        )
        found = nodes.run()
        there = 5 - len(gone)
        noise = []
        for tensor, array in found.mean.items():
            clipped = [
                NORM * (u[tensor] - start[tensor]) / length({n: u[n] - start[n] for n in start})
                for name, u in updates.items()
                if name not in gone
            ]
            noise.append((array - start[tensor] - np.mean(clipped, axis=0)).ravel())
        std = np.concatenate(noise).std() * there  # of the sum
        assert std == pytest.approx(Z * NORM * math.sqrt(there / 3), rel=0.03)
        assert std >= 0.97 * Z * NORM


def test_a_secure_private_run_reports_epsilon_and_its_clients_are_told_apart_by_nothing(
    signed: Signed,
) -> None:
    privacy = {"noise_multiplier": 1.0, "clipping_norm": 0.05, "where": "client"}
    scenario = signed.run(rounds=1, strategy={"secure": True, "weight": "equal", "privacy": privacy})
    report = signed.playground.report(scenario)
    assert report["privacy"]["epsilon"] == pytest.approx(_reference(1.0, 1))
    assert report["privacy"]["secure"] is True
    page = (scenario.folder / "report.html").read_text(encoding="utf-8")
    assert "The server sees sums with noise only." in page


@pytest.mark.parametrize("where", ["server", "client"])
def test_no_noise_falls_on_a_frozen_bottom(playground: Playground, where: str) -> None:
    privacy = {"noise_multiplier": 1.0, "clipping_norm": 0.05, "where": where}
    scenario = playground.scenario(
        rounds=3,
        strategy={"weight": "equal", "privacy": privacy},
        train={"freeze_bottom_after": 2},
    )
    playground.run(scenario)
    before, after = playground.state(scenario, 2), playground.state(scenario)
    for name, array in after.items():
        assert np.array_equal(array, before[name]) == (".layers.0." in name), name
    assert [row["updates"] for row in playground.rows(scenario, "round")] == [3, 3, 3]


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"weight": "examples"}, "needs weight: equal"),
        ({"name": "flora"}, "privacy goes with fedit and ffa"),
        ({"secure": True}, "needs where: client, clipping: fixed"),
        ({"privacy": {"clipping": "adaptive", "noise_multiplier": 1, "clipping_norm": 1}}, "below 0.4"),
        (
            {"privacy": {"noise_multiplier": 0, "clipping_norm": 1}},
            "noise_multiplier should be greater than 0",
        ),
    ],
)
def test_a_privacy_that_would_not_hold_is_refused(strategy: dict[str, Any], said: str) -> None:
    section = {"weight": "equal", "privacy": {"noise_multiplier": 1, "clipping_norm": 1}} | strategy
    with pytest.raises(RecipeError, match=re.escape(said)):
        scenario_from_mapping({"clients": 4, "rounds": 1, "strategy": section})
