"""Reports of modes, ranks, budgets, faults, secure sums and privacy, each figure against a second count."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from support.federations import Playground, Signed, losing_texts
from support.flower_count import FlowerCount
from support.in_process import InProcessCloud
from support.recounting import Recount, differences
from support.recounting_rows import Clients
from tightbeam.common.errors import CohortError
from tightbeam.federation.accounts.from_ledger import account
from tightbeam.federation.runtimes.grid import ClientCall
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.journal import moved_bytes
from tightbeam.simulations.client_app import app

LITTLE = {"taps": 2, "width": 8, "heads": 2}
EVERYTHING: dict[str, Any] = {
    "clients": 9,
    "rounds": 3,
    "eval_every": 1,
    "target_loss": 5.5,
    "client": {"cut": "1:1", "network": "home"},
    "groups": {
        "box": {"clients": 2, "cut": "2:2", "device": "gpu", "network": "lan", "r": 8},
        "laptop": {"clients": 1, "mode": "side", "side": LITTLE},
        "cached": {"clients": 1, "mode": "top", "network": "4g", "r": 2},
        "metered": {"clients": 1, "mode": "top", "cache_gb": 0, "budget": {"mb": 0.163, "degrade": ["int8"]}},
        "half": {"clients": 1, "share": "top"},
        "alone": {"clients": 1, "share": "none", "mode": "side", "side": LITTLE},
        "tiny": {"clients": 1, "device": {"gflops": 10, "memory_mb": 0.01}},
        "broken": {"clients": 1},
    },
    "train": {"lr": 2e-2, "freeze_bottom_after": 1},
    "faults": {"dropout": 0.15, "straggler": 0.2, "slowdown": 1000, "deadline_s": 20},
    "strategy": {"name": "flexlora"},
}  # fmt: skip
RANKS: dict[str, Any] = {"groups": {"small": {"clients": 1, "r": 2}}, "train": {"lr": 2e-2}}
PRIVACY = {"noise_multiplier": 1.0, "clipping_norm": 0.1}
SCENARIOS: dict[str, dict[str, Any]] = {
    "flora": {**RANKS, "strategy": {"name": "flora"}},
    "ffa": {**RANKS, "strategy": {"name": "ffa", "weight": "tokens"}},
    "hetlora": {**RANKS, "strategy": {"name": "hetlora"}},
    "zeropad": {**RANKS, "strategy": {"name": "zeropad", "weight": "equal"}},
    "private": {"sample": 2, "strategy": {"name": "fedit", "weight": "equal", "privacy": PRIVACY}},
}


@dataclass(frozen=True)
class Counted:
    """An experiment, and all that passed in it."""

    scenario: Scenario
    folder: Path
    sizes: dict[str, int]
    flower: FlowerCount

    def wrong(self) -> list[str]:
        report = account(self.folder, self.scenario).model_dump(mode="json")
        return differences(report, Recount(self.scenario, self.folder, self.sizes, self.flower).report())

    def planted(self, folder: Path, kind: str, field: str, more: float = 1) -> "Counted":
        """The same, but the first such row of the server's ledger that has such a figure has more of it."""
        lines = (self.folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        next(row for row in rows if row["row"] == kind and row.get(field))[field] += more
        folder.mkdir(exist_ok=True)
        for name in ("clients", "state"):
            (folder / name).symlink_to(self.folder / name)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "ledger.jsonl").write_text(text, encoding="utf-8")
        return replace(self, folder=folder)


def count(
    playground: Playground,
    sizes: dict[str, int],
    scenario: Scenario,
    *,
    shape: bool = False,
    client: ClientCall = app,
) -> Counted:
    flower = FlowerCount(client)
    playground.run_with(scenario, flower, shape=shape)
    return Counted(scenario, scenario.folder, sizes, flower)


@pytest.fixture(scope="module")
def sizes(federation_cloud: InProcessCloud) -> dict[str, int]:
    return Clients.sizes_at(federation_cloud.address)


@pytest.fixture(scope="module")
def everything(
    federation_cloud: InProcessCloud,
    backbone: Path,
    sizes: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Counted:
    playground = Playground(federation_cloud.address, tmp_path_factory.mktemp("everything"), backbone)
    scenario = playground.scenario(**EVERYTHING)
    return count(playground, sizes, scenario, client=losing_texts(scenario, "client-08"))


def test_modes_ranks_budgets_and_faults_all_at_once(everything: Counted) -> None:
    assert everything.wrong() == []
    rows = Playground.rows(everything.scenario, "client_round")
    assert {row["status"] for row in rows} == {"ok", "dropped", "late", "left", "failed"}
    metered = [row for row in rows if row["client"] == "client-04"]
    assert [row["codec"] for row in metered] == ["auto", "int8", ""], "it degraded, then it left"
    own = [
        row for kind in ("client_round", "client_eval") for row in Playground.rows(everything.scenario, kind)
    ]
    assert sum(moved_bytes(row) for row in own if row["client"] == "client-04") <= 163_000
    cached = [row for row in rows if row["client"] == "client-03"]
    assert sum(row["tokens"] > 0 == row["wire_up_bytes"] for row in cached) == 2, "it worked from its cache"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("client_round", ("wire_down_bytes", "tokens", "cloud_flops", "edge_flops", "joules", "loss")),
        ("client_round", ("adapter_up_bytes", "adapter_down_bytes", "ladder_down_bytes", "steps")),
        ("client_eval", ("wire_up_bytes", "adapter_down_bytes", "weight_bytes", "tokens", "loss")),
        ("round", ("loss", "updates", "virtual_s")),
        ("evaluation", ("loss", "worst", "median", "virtual_s")),
    ],
    ids=["steps", "adapters", "evaluations", "round", "evaluation"],
)
def test_a_wrong_row_is_found(everything: Counted, tmp_path: Path, kind: str, fields: list[str]) -> None:
    for field in fields:
        assert everything.planted(tmp_path / field, kind, field).wrong(), field


@pytest.mark.parametrize("name", SCENARIOS)
def test_strategies(playground: Playground, sizes: dict[str, int], tmp_path: Path, name: str) -> None:
    """And lines that are shaped, in one of them."""
    found = count(playground, sizes, playground.scenario(**SCENARIOS[name]), shape=name == "flora")
    assert found.wrong() == []
    plants = [("round", "epsilon" if name == "private" else "relative_error")]
    plants += [("client_round", "fold_down_bytes")] * (name in ("flora", "ffa"))
    for plant in plants:
        more = 1e-3 if plant[0] == "round" else 1
        assert found.planted(tmp_path / plant[1], *plant, more=more).wrong(), plant


def test_sums_in_secret_with_noise(signed: Signed, tmp_path: Path) -> None:
    """Of keys and shares there is Flower's own count, too; a loss is nobody's."""
    private = {**PRIVACY, "where": "client"}
    scenario = signed.scenario(
        clients=5,
        rounds=2,
        faults={"dropout": 0.2, "straggler": 0.3},
        strategy={"name": "ffa", "secure": True, "weight": "equal", "privacy": private},
        client={"mode": "top", "cut": "1:2"},
    )
    sizes = Clients.sizes_at(signed.playground.address, signed.certs / "client-00")
    found = count(signed.playground, sizes, scenario)
    assert found.wrong() == []
    assert {row["status"] for row in Playground.rows(scenario, "client_round")} == {"ok", "dropped"}
    for kind, field in (("round", "secure_bytes"), ("evaluation", "secure_bytes"), ("round", "epsilon")):
        assert found.planted(tmp_path / f"{kind}-{field}", kind, field).wrong(), field


def test_what_clients_moved_before_they_failed_was_moved(
    playground: Playground, sizes: dict[str, int]
) -> None:
    """Their first step makes the loss of the second one infinite."""
    wild = {"lr": 1e30, "optimizer": "sgd", "max_grad_norm": 0, "steps": 3}
    scenario, flower = playground.scenario(train=wild), FlowerCount()
    with pytest.raises(CohortError, match="client-00 says: The"):
        playground.run_with(scenario, flower)
    found = Counted(scenario, scenario.folder, sizes, flower)
    assert found.wrong() == []
    rows = Playground.rows(scenario, "client_round")
    assert [row["status"] for row in rows] == ["failed"] * 3
    assert min(row["wire_up_bytes"] for row in rows) > 0
