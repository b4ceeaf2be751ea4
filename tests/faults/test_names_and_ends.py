"""How `train` begins and ends, as its own process: names, locks, host names, and the last lines."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import Cloud, Command, Finished, run_command
from support.edge_runs import write_jsonl
from tightbeam.common.identity.identities import init_certificates

ROWS = [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(6)]
INSECURE = ("model.insecure=true", "output.name=MyRun-v1.2")


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with Cloud(model, tmp_path_factory.mktemp("cloud")) as running:
        yield running


def command(folder: Path, address: str, *settings: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(
        f"""
model: {{cloud: "{address}"}}
cut: "1:1"
adapter: {{r: 2, alpha: 4}}
data: {{train: {write_jsonl(folder / "train.jsonl", ROWS)}, eval_fraction: 0.3}}
train: {{steps: 3, batch_size: 2, lr: 1e-2, checkpoint_every: 1, threads: 1}}
output: {{dir: runs, name: run}}
"""
    )
    return ["train", "recipe.yaml", *(word for setting in settings for word in ("--set", setting))]


def train(folder: Path, address: str, *settings: str) -> Finished:
    return run_command(folder, *command(folder, address, *settings))


def test_the_last_lines_say_what_came_out_and_none_is_broken(cloud: Cloud, tmp_path: Path) -> None:
    done = train(tmp_path, cloud.address, *INSECURE)
    assert done.code == 0, done.err
    assert done.out == "runs/MyRun-v1.2\n"
    trained, cost, adapter, report = done.err.splitlines()[-4:]
    number = r"\d+\.\d{4}"
    assert re.fullmatch(
        rf"Done: 3 optimizer steps, loss {number}; evaluation loss {number} to {number}\.", trained
    )
    assert re.match(r"Price: .*\d", cost)
    assert len(cost) > 80
    assert adapter == "Adapter: runs/MyRun-v1.2/adapter"
    assert report == "Report: runs/MyRun-v1.2/report.html"
    assert all((tmp_path / line.partition(": ")[2]).exists() for line in (adapter, report))


def test_one_process_at_a_time(cloud: Cloud, tmp_path: Path) -> None:
    arguments = command(tmp_path, cloud.address, *INSECURE, "train.steps=2000")
    first = Command(tmp_path, *arguments)
    first.wait_until(lambda: (tmp_path / "runs" / "MyRun-v1.2" / "checkpoints" / "step-1").exists())
    for more in ([], ["--resume"]):
        second = run_command(tmp_path, *arguments, *more)
        assert second.code == 2
        assert re.search(rf"is in use by process {first.process.pid} on .*, started 20\d\d-", second.error)
    first.kill()
    resumed = Command(tmp_path, *arguments, "--resume")
    resumed.wait_until(lambda: "Going on from runs/MyRun-v1.2/checkpoints/step-" in resumed.err)
    resumed.kill()


def test_a_budget_that_is_too_small_does_not_use_up_the_name(cloud: Cloud, tmp_path: Path) -> None:
    small = train(tmp_path, cloud.address, *INSECURE, "train.max_mb=0.001")
    assert small.code == 1
    assert "Start a run with a larger train.max_mb" in small.error
    assert train(tmp_path, cloud.address, *INSECURE, "train.max_mb=10").code == 0


def test_identities_and_host_names(model: Path, tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    init_certificates(certs, clients=["clinic"], cloud_names=["127.0.0.1"])
    with Cloud(model, tmp_path / "cloud", "--identity", str(certs / "cloud")) as cloud:
        as_cloud = train(tmp_path, cloud.address, f"model.identity={certs / 'cloud'}")
        assert as_cloud.code == 3
        assert re.search(r"certs/cloud is the cloud's identity\. Give this edge a folder", as_cloud.error)
        as_clinic = f"model.identity={certs / 'clinic'}"
        elsewhere = train(tmp_path, cloud.address.replace("127.0.0.1", "localhost"), as_clinic)
        assert elsewhere.code == 3
        assert re.search(r"not for the host name in its address.*certs init.*--host NAME", elsewhere.error)
        assert not (tmp_path / "runs" / "run").exists()
        assert train(tmp_path, cloud.address, as_clinic).code == 0
