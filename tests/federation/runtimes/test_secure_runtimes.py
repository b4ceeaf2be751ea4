"""A secure federation on Flower's own engines: the masked sum is the same number on all of them."""

import importlib.util
from typing import Any

import numpy as np
import pytest

from support.federations import Signed
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.simulations.engines import run_deployed, run_on_ray

HAS_RAY = importlib.util.find_spec("ray") is not None
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("deployed"),
        pytest.param("ray", marks=pytest.mark.skipif(not HAS_RAY, reason="the extra ray is not installed")),
    ],
)
def test_the_masked_sum_is_the_same_on_every_runtime(engine: str, signed: Signed) -> None:
    changes: dict[str, Any] = {"clients": 3, "rounds": 1, "strategy": {"secure": True}}
    here, there = signed.run(**changes), signed.scenario(**changes)
    settings = RunConfig(there, signed.playground.address, signed.certs, there.folder)
    (run_deployed if engine == "deployed" else run_on_ray)(settings)
    left, right = signed.playground.state(here), signed.playground.state(there)
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)
    for kind in ("round", "evaluation"):
        one, other = ([row["loss"] for row in signed.playground.rows(s, kind)] for s in (here, there))
        assert one == other != []
    assert not any("loss" in row for row in signed.playground.rows(there, "client_round"))
