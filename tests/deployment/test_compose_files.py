"""The compose file of one machine runs as containers, to the end."""

from pathlib import Path

import pytest

from containers.engine import Engine
from containers.work import run_demo

pytestmark = pytest.mark.slow


def test_a_cloud_and_two_edges(engine: Engine, folder: Path, backbone: Path, texts: list[Path]) -> None:
    found = run_demo(engine, folder / "demo", backbone, texts)
    assert set(found) == {"quiz", "companion"}
    for told in found.values():
        assert told["optimizer_steps"] == 6
        assert told["eval_loss"][-1][1] < told["eval_loss"][0][1]
        assert told["retried_steps"] == 0
