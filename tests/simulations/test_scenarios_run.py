"""Every scenario in scenarios/, run in small: two against a cloud process that `simulate` starts for them."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from support.edge_runs import write_jsonl
from support.federations import sums
from support.in_process import InProcessCloud
from tightbeam.federation.scenario import load_scenario
from tightbeam.simulations import experiment
from tightbeam.simulations.experiment import run_scenario

SCENARIOS = sorted((Path(experiment.__file__).parent / "scenarios").glob("*.yaml"))
OWN_CLOUD = ("secure", "laptops-and-a-gpu-box")  # it makes identities, and fits a projection
CUTS = {"4:4": "1:1", "2:2": "1:1", "8:8": "2:2", "1:4": "1:1", "1:8": "1:2"}


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path, federation_cloud: InProcessCloud, backbone: Path, tmp_path: Path) -> None:
    rows = [row | {"topic": f"topic-{number % 21}"} for number, row in enumerate(sums(240))]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    scenario, own = load_scenario(path), path.stem in OWN_CLOUD
    changes = [
        f"backbone={backbone}",
        f"data.source={data}",
        "data.max_length=48",
        "threads=1",
        "rounds=2",
        "eval_every=0",
        f"output.dir={tmp_path}",
        f"client.cut={CUTS[scenario.client.cut]}",
        *(f"groups.{n}.cut={CUTS[g.cut]}" for n, g in scenario.groups.items() if g.cut),
        *(["client.side={taps: 2, width: 8, heads: 2}"] if scenario.client.mode == "side" else []),
        *(f"groups.{n}.budget.mb=0.5" for n, g in scenario.groups.items() if g.budget),
        *([f"eval_sample={scenario.sample}"] if (scenario.eval_sample or 0) > 10 else []),
        *([] if own else [f"cloud={{address: {federation_cloud.address}, insecure: true}}"]),
    ]
    small = load_scenario(path, changes)
    page = run_scenario(small, console=Console(quiet=True))
    assert page.is_file()
    report = json.loads((page.parent / "federation.json").read_text(encoding="utf-8"))
    assert len(report["rounds"]) == small.rounds
    assert len(report["clients"]) == small.clients
    first, last = report["evaluations"][0], report["evaluations"][-1]
    assert last["loss"] < first["loss"]
    assert (page.parent / "adapter" / "adapter_config.json").is_file()
    if own:
        assert (page.parent / "certs" / "cloud" / "identity.crt").is_file(), "identities, not --insecure"
