"""One small backbone and one cloud for all federations of these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import Cloud
from support.federations import Playground, Signed, save_backbone
from support.in_process import InProcessCloud
from tightbeam.cloud.projections import ProjectionOptions
from tightbeam.common.identity.authority import init_certificates


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("federated-backbone"))


@pytest.fixture(scope="session")
def federation_cloud(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCloud]:
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
    folder = tmp_path_factory.mktemp("identities") / "certs"
    init_certificates(folder, clients=[f"client-{number:02d}" for number in range(5)])
    return folder


@pytest.fixture(scope="session")
def tls_cloud(backbone: Path, certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    folder = tmp_path_factory.mktemp("tls-cloud")
    with Cloud(backbone, folder, "--identity", str(certs / "cloud")) as cloud:
        yield cloud


@pytest.fixture
def signed(tls_cloud: Cloud, certs: Path, backbone: Path, tmp_path: Path) -> Signed:
    return Signed(Playground(tls_cloud.address, tmp_path, backbone), certs)


@pytest.fixture
def playground(federation_cloud: InProcessCloud, backbone: Path, tmp_path: Path) -> Playground:
    return Playground(federation_cloud.address, tmp_path, backbone)
