"""A small backbone, and a cloud that serves it with taps; a test module may have its own instead."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cached_runs import save_model
from support.in_process import InProcessCloud
from tightbeam.cloud.projections import ProjectionOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of six blocks, and a text to fit projections on."""
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    (path / "public.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    return path


@pytest.fixture(scope="module")
def cloud(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCloud]:
    """In this process, offering projections to four elements."""
    place = tmp_path_factory.mktemp("cloud")
    fit = ProjectionOptions(file=place / "p.safetensors", text=folder / "public.txt", size=4)
    with InProcessCloud(folder, place, projection=fit) as running:
        yield running
