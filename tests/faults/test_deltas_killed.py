"""Either end loses what delta codecs remember, by SIGKILL: the run goes on, with whole values for once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import Cloud, Command, run_command
from support.edge_runs import write_jsonl
from support.split_runs import same, split_run
from tightbeam.common.costs.meter import read_ledger
from tightbeam.common.costs.summary import summarise

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CODEC, STEPS, BATCHES = "delta-int4/int8", 9, 3


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with Cloud(model, tmp_path_factory.mktemp("cloud")) as process:
        yield process


@pytest.fixture(scope="module")
def calm(cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    assert run_command(folder, "train", str(_recipe(folder, cloud))).code == 0
    return folder


def test_a_killed_cloud_changes_no_bit(cloud: Cloud) -> None:
    """Killed between a forward and its backward, in the second of three epochs."""

    def kill(step: int) -> None:
        if step == 4:
            cloud.kill()
            cloud.start()

    with split_run(cloud.address, codec=CODEC) as calm, split_run(cloud.address, codec=CODEC) as shaken:
        expected = calm.train(STEPS, BATCHES)
        assert same(shaken.train(STEPS, BATCHES, kill), expected)
        shaken.assert_accounts_agree()
        again = [row.step for row in shaken.rows if row.kind == "forward" and row.attempts > 1]
    assert again == [5, 6, 7]  # each batch once; the third epoch is as cheap as ever
    moved = {row.step: row.bytes.payload_up_bytes for row in shaken.rows if row.kind == "forward"}
    assert moved[8] == moved[2] < moved[5] / 4
    with split_run(cloud.address, codec="int4/int8") as plain:
        assert not same(plain.train(STEPS, BATCHES), expected)


def _recipe(folder: Path, cloud: Cloud) -> Path:
    rows = [{"prompt": f"{n} + 1 =", "completion": str(n + 1) * (1 + n % 4)} for n in range(12)]
    data = write_jsonl(folder / "train.jsonl", rows)
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
model: {{cloud: "{cloud.address}", insecure: true}}
cut: "1:1"
codec: {CODEC}
adapter: {{r: 2, alpha: 4}}
data: {{train: {data}, eval: {data}}}
train: {{epochs: 4, batch_size: 3, lr: 1e-2, checkpoint_every: 3, threads: 1}}
output: {{dir: {folder}, name: run, report: false}}
"""
    )
    return path


def test_a_killed_edge_goes_on_with_its_bases(cloud: Cloud, calm: Path, tmp_path: Path) -> None:
    """Bit for bit: they are in its checkpoint, and the cloud gets them once more."""
    training = Command(tmp_path, "train", str(_recipe(tmp_path, cloud)))
    metrics = tmp_path / "run" / "metrics.csv"
    training.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 7)
    training.kill()
    last = run_command(tmp_path, "train", str(tmp_path / "recipe.yaml"), "--resume")
    assert last.code == 0, last.err
    assert "Retrying" not in last.err
    steps = [row for row in read_ledger(tmp_path / "run" / "ledger.jsonl") if row["row"] == "step"]
    assert 1 <= sum(row["attempts"] > 1 for row in steps) <= 12  # no sample more than once
    calm_loss, loss = (summarise([each / "run"]).edges[0].eval_loss for each in (calm, tmp_path))
    assert loss == calm_loss
    adapters = [each / "run" / "adapter" / "adapter_model.safetensors" for each in (calm, tmp_path)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_what_crosses_is_what_was_predicted(calm: Path) -> None:
    """To the byte, keys and digests included, evaluations too."""
    (edge,) = summarise([calm / "run"]).edges
    assert edge.prediction is not None
    assert edge.prediction.predicted_payload_bytes == edge.prediction.measured_payload_bytes
    assert edge.codecs["activations_up"] == "delta-int4"
