"""One small backbone and one cloud for all federations of these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.federations import Playground, save_backbone
from support.in_process import InProcessCloud


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("federated-backbone"))


@pytest.fixture(scope="session")
def federation_cloud(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCloud]:
    with InProcessCloud(backbone, tmp_path_factory.mktemp("federated-cloud")) as cloud:
        cloud.listen()
        yield cloud


@pytest.fixture
def playground(federation_cloud: InProcessCloud, backbone: Path, tmp_path: Path) -> Playground:
    return Playground(federation_cloud.address, tmp_path, backbone)
