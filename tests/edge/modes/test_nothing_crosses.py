"""Once each sample has crossed, nothing does: by the ledger, by a proxy that counts, and with the cloud dead.

Real cloud processes over gRPC. What is counted includes everything on the connection: framing, window updates
and pings. Killed edges resume to the same bits, whether the cache was filling or full.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.cached_runs import A_BATCH, A_SAMPLE, cached_recipe, save_model
from support.commands import Cloud, Command, run_command
from support.counting_proxy import CountingProxy
from support.edge_runs import quiet
from support.mitm import Mitm, Way
from tightbeam.common.accounts.rows import StepRow
from tightbeam.edge import connect
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.report.meter import read_ledger
from tightbeam.edge.training.folder import RunFolder
from tightbeam.edge.training.recipe_run import LoadedModel, TrainResult, train_recipe

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
STEPS_PER_EPOCH = 6  # 18 of 23 examples train, three a step; the others evaluate
MODES: dict[str, dict[str, Any]] = {
    "top": {"mode": "top"},
    "side": {"mode": "side", "side": {"taps": 2, "width": 16, "heads": 2}},
    "freeze": {"mode": "ushape", "train": {"freeze_bottom_after": 0.5}},
    "ushape": {"mode": "ushape"},
}
# The step by which each has fetched all: a freeze comes half an epoch later, and the pass takes one epoch.
QUIET_AFTER = {"top": 6, "side": 6, "freeze": 9, "ushape": 6}
_SETTLE_S = 0.3  # acknowledgements of what has crossed already


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "weights"))


def serve(model: Path, folder: Path, max_tokens: int = A_BATCH) -> Cloud:
    folder.mkdir(exist_ok=True)
    (folder / "public.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    fit = ("--projection-text", "public.txt", "--projection", "p.safetensors", "--tap-size", "4")
    return Cloud(model, folder, *fit, "--max-tokens-per-step", str(max_tokens))


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with serve(model, tmp_path_factory.mktemp("cloud")) as process:
        yield process


@pytest.fixture
def patient(model: Path, tmp_path: Path) -> Iterator[Cloud]:
    """One that takes a sample at a time, so that a fill takes long enough to be killed in."""
    with serve(model, tmp_path / "patient", A_SAMPLE) as process:
        yield process


def recipe_of(folder: Path, mode: str, address: str, **train: Any) -> Recipe:
    changes = dict(MODES[mode])
    train = {"checkpoint_every": 0, "eval_every": STEPS_PER_EPOCH, **changes.pop("train", {}), **train}
    section = {"cloud": address, "insecure": True}
    return cached_recipe(folder, model=section, data={"eval_fraction": 0.2}, train=train, **changes)


@dataclass
class _Watched:
    """The accounts of the wire, with a moment to look around whenever the training loop asks for them."""

    rows: list[StepRow]
    look: Callable[[], None]

    def drain(self) -> Sequence[StepRow]:
        rows, self.rows[:] = list(self.rows), []
        self.look()
        return rows


def train_watched(recipe: Recipe, look: Callable[[], None]) -> TrainResult:
    """Train; `look` is called when the accounts of a step or an evaluation are closed."""
    rows: list[StepRow] = []

    def on_row(row: dict[str, Any]) -> None:
        if row["row"] == "step":
            rows.append(StepRow.from_json(row))

    def load(recipe: Recipe) -> LoadedModel:
        cloud = connect(recipe.model.cloud, insecure=True, on_row=on_row)
        return LoadedModel(
            model=cloud.load_model(recipe.cut, codec=recipe.codec),
            tokenizer=cloud.load_tokenizer(),
            close=cloud.close,
            steps=_Watched(rows, look),
            fingerprint=cloud.card.fingerprint,
            run=cloud.run,
            card=cloud.card,
        )

    return train_recipe(recipe, load=load, console=quiet()[0])


def optimizer_steps(recipe: Recipe) -> int:
    """How many the ledger holds by now."""
    ledger = RunFolder(recipe.run_folder).ledger
    return sum(row["row"] == "optimizer_step" for row in read_ledger(ledger)) if ledger.exists() else 0


def crossed_after(recipe: Recipe, step: int) -> int:
    """Wire bytes by the ledger after optimizer step `step` and the evaluation that belongs to it."""
    rows = read_ledger(RunFolder(recipe.run_folder).ledger)
    place = max(
        i for i, row in enumerate(rows) if row["row"] in ("optimizer_step", "eval") and row["n"] <= step
    )
    later = [row for row in rows[place:] if row["row"] == "step"]
    return sum(int(row["wire_up_bytes"]) + int(row["wire_down_bytes"]) for row in later)


@pytest.mark.parametrize("mode", MODES)
def test_by_ledger_and_by_proxy(cloud: Cloud, tmp_path: Path, mode: str) -> None:
    """Three epochs with an evaluation after each; `ushape` shows that both would have noticed."""
    with CountingProxy(cloud.port) as proxy:
        recipe = recipe_of(tmp_path, mode, f"127.0.0.1:{proxy.port}")
        seen: list[tuple[int, int]] = []

        def look() -> None:
            if optimizer_steps(recipe) > QUIET_AFTER[mode]:
                if not seen:
                    time.sleep(_SETTLE_S)
                seen.append(proxy.snapshot())

        result = train_watched(recipe, look)
        assert (result.exit_code, result.optimizer_steps) == (0, 3 * STEPS_PER_EPOCH)
        assert min(seen[0]) > 10_000
    assert len(seen) == 3 * STEPS_PER_EPOCH - QUIET_AFTER[mode] - 1 + 2
    crossed = crossed_after(recipe, QUIET_AFTER[mode])
    if mode == "ushape":
        assert crossed > 100_000
        assert seen == sorted(set(seen))
    else:
        assert crossed == 0
        assert set(seen) == {seen[0]}


@pytest.mark.parametrize("mode", ["top", "side", "freeze"])
def test_with_the_cloud_killed(model: Path, tmp_path: Path, mode: str) -> None:
    with serve(model, tmp_path / "cloud") as doomed:
        recipe = recipe_of(tmp_path, mode, doomed.address, checkpoint_every=6)

        def look() -> None:
            if optimizer_steps(recipe) > QUIET_AFTER[mode] and doomed.command.process.is_alive():
                doomed.kill()

        result = train_watched(recipe, look)
        assert doomed.command.process.exitcode == -9
    assert (result.exit_code, result.optimizer_steps) == (0, 3 * STEPS_PER_EPOCH)
    rows = read_ledger(result.folder.ledger)
    assert len([row for row in rows if row["row"] == "eval"]) == 4
    assert result.last_eval_loss is not None
    assert result.first_eval_loss is not None
    assert result.last_eval_loss < result.first_eval_loss


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "runs/run/adapter").glob("*.safetensors")}


@pytest.mark.parametrize("mode", ["side"])
def test_a_killed_edge_resumes_to_the_same_bits(patient: Cloud, tmp_path: Path, mode: str) -> None:
    """SIGKILL while the cache fills, and again in a later epoch. Dropout is on."""

    def written(name: str, address: str) -> Path:
        (tmp_path / name).mkdir()
        recipe = recipe_of(tmp_path / name, mode, address, checkpoint_every=4, batch_size=1, epochs=6)
        (tmp_path / name / "recipe.yaml").write_text(recipe.resolved_yaml())
        return tmp_path / name

    calm = written("calm", patient.address)
    assert run_command(calm, "train", "recipe.yaml").code == 0
    with Mitm(patient.address) as mitm:
        shaken = written("shaken", mitm.address)
        ledger = shaken / "runs/run/ledger.jsonl"
        filling, killed = Command(shaken, "train", "recipe.yaml"), threading.Event()

        def kill_once(way: Way, number: int) -> None:
            if way == "up" and number >= 30 and not killed.is_set():
                killed.set()
                filling.signal(signal.SIGKILL)  # the main thread alone waits for its end

        mitm.on_record = kill_once
        filling.process.join(60)
        assert filling.process.exitcode == -9
        first = [row["row"] for row in read_ledger(ledger)]
        assert 0 < first.count("optimizer_step") < 18  # within the first epoch
        later = Command(shaken, "train", "recipe.yaml", "--resume")
        later.wait_until(lambda: ledger.read_text().count('"optimizer_step"') > 40)
        later.kill()
        assert later.process.exitcode == -9
        last = run_command(shaken, "train", "recipe.yaml", "--resume")
        assert last.code == 0, last.err
    assert weights(shaken) == weights(calm)
    assert set(weights(calm)) == {"adapter_model.safetensors", "side.safetensors"}
    kinds = [row["row"] for row in read_ledger(ledger)]
    assert (
        "step" not in kinds[len(kinds) - kinds[::-1].index("run") :]
    )  # the last start found all in the cache
