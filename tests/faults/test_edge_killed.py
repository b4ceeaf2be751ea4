"""`tightbeam train` dies by SIGKILL and goes on with --resume over the real wire: equal bits."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.commands import Cloud, Command, run_command
from support.edge_runs import write_jsonl
from tightbeam.edge import connect
from tightbeam.edge.report.meter import read_ledger

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
STEPS = 24


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with Cloud(model, tmp_path_factory.mktemp("cloud")) as process:
        yield process


def recipe(folder: Path, cloud: Cloud) -> Path:
    folder.mkdir(exist_ok=True)
    data = write_jsonl(
        folder / "train.jsonl",
        [{"prompt": f"{n} + 1 =", "completion": str(n + 1) * (1 + n % 4)} for n in range(13)],
    )
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
model: {{cloud: "{cloud.address}", insecure: true}}
cut: "1:1"
adapter: {{r: 2, alpha: 4, dropout: 0.1}}
data: {{train: {data}}}
train: {{steps: {STEPS}, batch_size: 3, lr: 1e-2, checkpoint_every: 3, threads: 1}}
output: {{dir: {folder}, name: run, report: false}}
"""
    )
    return path


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    return tensors


def assert_every_billed_step_is_known(cloud: Cloud, rows: list[dict[str, Any]]) -> None:
    """A step is in the edge's ledger before it leaves, so no kill makes the cloud bill one that is not."""
    sent = Counter(row["run"] for row in rows if row["row"] == "sent")
    answered = Counter(row["run"] for row in rows if row["row"] == "step")
    with connect(cloud.address, insecure=True) as edge:
        billed = {run.run: run.forward_steps + run.backward_steps for run in edge.usage()}
    assert len(sent) == 4
    for run, number in sent.items():
        assert answered[run] <= billed[run] <= number
    assert answered.total() < sent.total()  # a row of the last steps was lost each time


def test_killed_three_times_and_resumed(cloud: Cloud, tmp_path: Path) -> None:
    calm, shaken = tmp_path / "calm", tmp_path / "shaken"
    assert run_command(calm, "train", str(recipe(calm, cloud))).code == 0
    path = recipe(shaken, cloud)
    for number, kill_after in enumerate((1, 5, 9)):
        training = Command(shaken, "train", str(path), *(["--resume"] if number else []))
        metrics = shaken / "run" / "metrics.csv"
        training.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > kill_after)  # noqa: B023
        training.kill()
        assert training.process.exitcode == -9
    last = run_command(shaken, "train", str(path), "--resume")
    assert last.code == 0, last.err
    assert "Going on from" in last.err
    expected, resumed = adapter(calm), adapter(shaken)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    rows = read_ledger(shaken / "run" / "ledger.jsonl")
    assert_every_billed_step_is_known(cloud, rows)
    starts = [row for row in read_ledger(shaken / "run" / "ledger.jsonl") if row["row"] == "run"]
    assert len(starts) == len({row["run"] for row in starts}) == 4  # work done again is billed as new work
