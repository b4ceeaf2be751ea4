"""docs/deployment.md works as written: three machines, an upgrade, a backup, and back again."""

from pathlib import Path

import pytest

from containers.engine import Engine
from containers.page import run_page

pytestmark = pytest.mark.slow


def test_every_block_of_the_page(engine: Engine, folder: Path, backbone: Path, texts: list[Path]) -> None:
    found = run_page(engine, folder / "page", backbone, texts)
    assert set(found) == {"clinic", "hospital"}
    dump = (folder / "page" / "ledger.sql").read_text(encoding="utf-8")
    assert "CREATE TABLE" in dump
    sources = {path.name for path in (folder / "page" / "clinic" / "identity").iterdir()}
    assert "ca.key" not in sources
