"""What the fault tests share: one tiny model on disk, and caches of their own."""

from pathlib import Path

import pytest

from support.split_runs import save_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "cache"))
