"""What all tests share: one torch thread, a weight cache that is thrown away, and clouds that start once.

Nothing heavy is imported here: the tests of the command line must stay quick.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tightbeam.common.files import cache_folder

if TYPE_CHECKING:
    from support.commands import Cloud
    from support.federations import Playground, Signed
    from support.in_process import InProcessCloud

# One thread gives the same sums in the same order every time, and two test processes do not fight for cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Ledgers and states wait for the disk at each write. Where memory has room for the files, nothing waits.
_MEMORY, _ROOM_BYTES = Path("/dev/shm"), 8 << 30
if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

# How long an example takes says more about what runs beside the tests than about the code.
hypothesis.settings.register_profile("tightbeam", deadline=None)
hypothesis.settings.load_profile("tightbeam")

_SMOLLM2 = cache_folder() / "smollm2-135m-instruct"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the real model are collected only where `make demo` has converted it already."""
    if not _SMOLLM2.is_dir():
        without = [item for item in items if item.get_closest_marker("smollm2")]
        items[:] = [item for item in items if item not in without]
        config.hook.pytest_deselected(items=without)


def pytest_collection_finish() -> None:
    """Every test module is imported by now."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The converted SmolLM2-135M-Instruct."""
    return _SMOLLM2


@pytest.fixture(autouse=True)
def _own_cache(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No test writes into the user's cache; slow ones read the demo's model from it."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The saved tiny model of a family."""
    from support.tiny import tiny_model

    base, saved = tmp_path_factory.mktemp("models"), set[str]()

    def folder(family: str) -> Path:
        if family not in saved:
            tiny_model(family).save_pretrained(base / family)
            saved.add(family)
        return base / family

    return folder


@pytest.fixture(scope="session")
def tiny_cloud(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], "InProcessCloud"]]:
    """The cloud of a family, started once; it listens at `cloud.address`."""
    from support.in_process import InProcessCloud

    clouds: dict[str, InProcessCloud] = {}

    def cloud(family: str) -> InProcessCloud:
        if family not in clouds:
            clouds[family] = InProcessCloud(tiny_folder(family), tmp_path_factory.mktemp(f"cloud-{family}"))
            clouds[family].listen()
        return clouds[family]

    yield cloud
    for started in clouds.values():
        started.close()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model of all federations."""
    from support.federations import save_backbone

    return save_backbone(tmp_path_factory.mktemp("federated-backbone"))


@pytest.fixture(scope="session")
def federation_cloud(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["InProcessCloud"]:
    """The cloud of all federations, which offers a projection to four elements."""
    from support.in_process import InProcessCloud
    from tightbeam.cloud.projections import ProjectionOptions

    folder = tmp_path_factory.mktemp("federated-cloud")
    text = folder / "public.txt"
    text.write_text("Sums are taught in school, and some are harder than others. " * 40, encoding="utf-8")
    projection = ProjectionOptions(file=folder / "projection.safetensors", text=text, size=4)
    with InProcessCloud(backbone, folder, projection=projection) as cloud:
        cloud.listen()
        yield cloud


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Identities of a cloud and five clients."""
    from tightbeam.common.identity.authority import init_certificates

    folder = tmp_path_factory.mktemp("identities") / "certs"
    init_certificates(folder, clients=[f"client-{number:02d}" for number in range(5)])
    return folder


@pytest.fixture(scope="session")
def tls_cloud(backbone: Path, certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cloud"]:
    """A cloud in a process of its own, which knows its clients by their certificates."""
    from support.commands import Cloud

    folder = tmp_path_factory.mktemp("tls-cloud")
    with Cloud(backbone, folder, "--identity", str(certs / "cloud")) as cloud:
        yield cloud


@pytest.fixture
def signed(tls_cloud: "Cloud", certs: Path, backbone: Path, tmp_path: Path) -> "Signed":
    """A federation whose clients have identities."""
    from support.federations import Playground, Signed

    return Signed(Playground(tls_cloud.address, tmp_path, backbone), certs)


@pytest.fixture
def playground(federation_cloud: "InProcessCloud", backbone: Path, tmp_path: Path) -> "Playground":
    """A federation in one process, by default in the clear."""
    from support.federations import Playground

    return Playground(federation_cloud.address, tmp_path, backbone)
