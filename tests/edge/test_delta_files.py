"""What delta codecs remember goes with a checkpoint, sealed: a resumed run is the undisturbed one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from support.cached_runs import CrashError, cached_recipe, losses, save_model, train_over
from support.in_process import InProcessCloud
from tightbeam.common.config import Codecs, Recipe
from tightbeam.common.errors import IdentityError
from tightbeam.common.wire.delta import BaseStore, Samples
from tightbeam.edge import delta_files
from tightbeam.edge.cache import Scope
from tightbeam.edge.delta_files import DeltaFiles
from tightbeam.edge.deltas import EdgeDeltas
from tightbeam.edge.training import TrainResult

CODECS = Codecs.model_validate("delta-int4/fp32")
SIZE, LENGTHS = 32, (4, 3)
SAMPLES = Samples((b"a" * 16, b"b" * 16), LENGTHS, SIZE)
SCOPE = Scope(
    fingerprint="f", cut="2:2", bottom_sha256="", codec_up="int4", codec_down="int4", dtype="float32",
    hidden_size=SIZE,
)  # fmt: skip
SECRET = b"s" * 32
Files = Callable[..., tuple[DeltaFiles, EdgeDeltas]]


def rows(seed: int) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), SIZE, generator=torch.Generator().manual_seed(seed)).bfloat16()


def stores(deltas: EdgeDeltas) -> list[BaseStore]:
    found = [deltas._up, deltas._down]
    assert None not in found
    return [store for store in found if store is not None]


def content(deltas: EdgeDeltas) -> list[bytes]:
    return list(deltas.entries())


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def files(tmp_path: Path, said: list[str]) -> Files:
    (tmp_path / "step-1").mkdir()

    def make(secret: bytes | None = SECRET) -> tuple[DeltaFiles, EdgeDeltas]:
        deltas = EdgeDeltas(CODECS, 1e6)
        return DeltaFiles(deltas, SCOPE, tmp_path / "deltas", secret=secret, say=said.append), deltas

    return make


@pytest.fixture
def saved(files: Files, tmp_path: Path) -> EdgeDeltas:
    """Remembers two samples both ways, and wrote that down."""
    written, deltas = files()
    for seed, store in enumerate(stores(deltas)):
        store.remember(SAMPLES, rows(seed))
    written.save(tmp_path / "step-1")
    return deltas


@pytest.mark.parametrize("shard_bytes", [1, 10**6])
@pytest.mark.parametrize("secret", [SECRET, None])
def test_everything_comes_back_in_its_order(
    files: Files, tmp_path: Path, secret: bytes | None, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_files, "_SHARD_BYTES", shard_bytes)
    written, deltas = files(secret)
    for seed, store in enumerate(stores(deltas)):
        store.remember(SAMPLES, rows(seed))
        store.remember(Samples(SAMPLES.keys[:1], LENGTHS[:1], SIZE), rows(9)[:4])
    written.save(tmp_path / "step-1")
    assert len(list((tmp_path / "step-1").iterdir())) == (5 if shard_bytes == 1 else 1)
    read, found = files(secret)
    read.load(tmp_path / "step-1")
    assert content(found) == content(deltas)
    assert found.num_bytes == deltas.num_bytes


def test_nothing_lies_in_plain(saved: EdgeDeltas, tmp_path: Path) -> None:
    (path,) = (tmp_path / "step-1").iterdir()
    data = path.read_bytes()
    secret, *bases = content(saved)
    assert secret not in data
    assert not any(entry[1:17] in data or entry[17:81] in data for entry in bases)


def test_nothing_remembered_is_nothing_written(files: Files, tmp_path: Path) -> None:
    written, deltas = files()
    written.save(tmp_path / "step-1")
    assert not list((tmp_path / "step-1").iterdir())
    written.load(tmp_path / "step-1")
    assert deltas.num_bytes == 0
    assert not (tmp_path / "deltas").exists()


@pytest.mark.usefixtures("saved")
def test_another_identity_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="another identity"):
        files(b"t" * 32)[0].load(tmp_path / "step-1")


@pytest.mark.parametrize("lost", ["keys", "bytes"])
def test_what_cannot_be_opened_is_said_and_forgotten(
    files: Files, saved: EdgeDeltas, tmp_path: Path, said: list[str], lost: str
) -> None:
    assert saved.num_bytes
    if lost == "keys":
        shutil.rmtree(tmp_path / "deltas")
    else:
        (path,) = (tmp_path / "step-1").iterdir()
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    read, deltas = files()
    read.load(tmp_path / "step-1")
    assert deltas.num_bytes == 0
    assert len(said) == 1
    assert "whole values" in said[0]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCloud]:
    folder = tmp_path_factory.mktemp("cloud")
    save_model(folder / "model")
    with InProcessCloud(folder / "model", folder) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def calm(cloud: InProcessCloud, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Trained without a break."""
    return train_over(cloud, delta_recipe(tmp_path_factory.mktemp("calm")))[0]


def delta_recipe(folder: Path) -> Recipe:
    changes = {"mode": "ushape", "codec": "delta-int4/int8", "train": {"checkpoint_every": 2}}
    return cached_recipe(folder, **changes)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kept", [True, False])
def test_a_crash_in_the_second_epoch_changes_no_bit(
    cloud: InProcessCloud, calm: TrainResult, tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would without what was remembered; the cloud, which knows nothing of the new run, asks for it."""

    def crash(num_steps: int) -> None:
        if num_steps == 24:  # forwards and backwards
            raise CrashError

    with pytest.raises(CrashError):
        train_over(cloud, delta_recipe(tmp_path), act=crash)
    if not kept:
        monkeypatch.setattr(DeltaFiles, "load", lambda files, checkpoint: None)
    result, _ = train_over(cloud, delta_recipe(tmp_path), resume=True)
    assert (losses(result.folder) == losses(calm.folder)) == kept
