"""The cloud comes back in another number format: neither a live run nor a resumed one goes on with it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import Cloud, Command, run_command
from support.edge_runs import write_jsonl
from support.split_runs import split_run
from tightbeam.common.errors import FingerprintError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def cloud(model: Path, tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(model, tmp_path / "cloud") as process:
        yield process


def test_between_forward_and_backward(cloud: Cloud) -> None:
    def restart() -> None:
        cloud.kill()
        cloud.start("--dtype", "bfloat16")

    told = (
        r"computes in bfloat16 now; this model was loaded for float32\. Have it served with --dtype float32"
    )
    with split_run(cloud.address) as run, pytest.raises(FingerprintError, match=told):
        run.gradients(between=restart)


def test_between_a_run_and_its_resume(cloud: Cloud, tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b" * n} for n in range(1, 9)]
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{cloud: "{cloud.address}", insecure: true}}
cut: "1:1"
adapter: {{r: 2, alpha: 4}}
data: {{train: {data}}}
train: {{steps: 2000, batch_size: 2, checkpoint_every: 2, threads: 1}}
output: {{dir: {tmp_path}, name: run, report: false}}
"""
    )
    first = Command(tmp_path / "edge", "train", str(recipe))
    first.wait_until(lambda: any((tmp_path / "run" / "checkpoints").glob("step-*")))
    first.kill()
    cloud.kill()
    cloud.start("--dtype", "bfloat16")
    again = run_command(tmp_path / "edge", "train", str(recipe), "--resume")
    assert again.code == 2
    assert re.search(r"cloud's dtype was float32 and is now bfloat16; edge's dtype was", again.error)
