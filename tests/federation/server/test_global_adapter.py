"""The server's adapter: to the bit through Flower's records, fair to every shape, exact when folded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightbeam.federation.contract.layers import layers_of
from tightbeam.federation.contract.records import from_record, to_record
from tightbeam.federation.math import LoraAdapter, parse_adapter
from tightbeam.federation.server.global_adapter import GlobalAdapter

SHAPES = {f"m.layers.{n}.q.lora_{f}.weight": s for n in (0, 5) for f, s in (("A", (4, 12)), ("B", (10, 4)))}
LAYERS = layers_of(SHAPES, "test")


def _random(rank: int, seed: int) -> LoraAdapter:
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (rows, columns) in SHAPES.items():
        shape = (rank, columns) if ".lora_A." in name else (rows, rank)
        arrays[name] = rng.normal(size=shape)
    return parse_adapter(arrays, 1.0, "test")


def _delta(adapter: LoraAdapter | None) -> dict[str, np.ndarray]:
    return {name: m.delta_w() for name, m in adapter.modules.items()} if adapter else {}


def test_layers_know_names_and_shapes_but_no_values() -> None:
    assert LAYERS.rank == 0
    assert LAYERS.shapes() == {"m.layers.0.q": (10, 12), "m.layers.5.q": (10, 12)}


def test_the_start_has_no_effect_and_smaller_ranks_start_as_the_first_rows() -> None:
    start = GlobalAdapter.initial([LAYERS], 8, seed=3)
    assert all(not delta.any() for delta in _delta(start.learned).values())
    wide, _ = start.for_client(LAYERS.modules, 8, 2.0, 0)
    narrow, _ = start.for_client(LAYERS.modules, 2, 2.0, 0)
    name = "m.layers.0.q.lora_A.weight"
    assert np.array_equal(wide[name][:2], narrow[name])
    assert wide[name].any()
    assert wide[name].dtype == np.float32


def test_records_lose_nothing() -> None:
    state = GlobalAdapter(_random(3, 0), _random(5, 1))
    back = GlobalAdapter.from_arrays(from_record(to_record(state.arrays())))
    for part in ("learned", "folded"):
        one, other = getattr(state, part), getattr(back, part)
        for name in one.modules:
            assert np.array_equal(one.modules[name].A_RI, other.modules[name].A_RI)
            assert np.array_equal(one.modules[name].B_OR, other.modules[name].B_OR)
    assert GlobalAdapter.from_arrays(GlobalAdapter(_random(3, 0)).arrays()).folded is None


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0])
def test_a_client_gets_its_layers_at_its_scale(scale: float) -> None:
    state = GlobalAdapter(_random(4, 0))
    arrays, fold = state.for_client(["m.layers.5.q"], 4, scale, 0)
    assert set(arrays) == {"m.layers.5.q.lora_A.weight", "m.layers.5.q.lora_B.weight"}
    assert fold == {}
    delta = scale * arrays["m.layers.5.q.lora_B.weight"] @ arrays["m.layers.5.q.lora_A.weight"]
    np.testing.assert_allclose(delta, _delta(state.learned)["m.layers.5.q"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folded", [None, _random(5, 1)], ids=["learned", "learned and folded"])
def test_where_clients_fold_each_rank_has_all_of_delta_w(folded: LoraAdapter | None) -> None:
    state = GlobalAdapter(_random(4, 0), folded)
    exact = _delta(state.whole())
    for rank in (1, 3, 4, 6):
        arrays, fold = state.for_client(["m.layers.5.q"], rank, 2.0, 0, folds=True)
        worn = _delta(parse_adapter(arrays, 2.0, "ward"))["m.layers.5.q"]
        rest = _delta(parse_adapter(fold, 1.0, "ward") if fold else None).get("m.layers.5.q", 0.0)
        np.testing.assert_allclose(worn + rest, exact["m.layers.5.q"], atol=1e-5)
        assert (np.abs(worn - exact["m.layers.5.q"]).max() > 0.1) == bool(fold)
        assert set(fold) <= {f"m.layers.5.q.lora_{factor}.weight" for factor in "AB"}


def test_a_wider_client_gets_the_same_delta_and_room_to_learn() -> None:
    state = GlobalAdapter(_random(2, 0))
    arrays, _ = state.for_client(LAYERS.modules, 6, 1.0, 7)
    A, B = arrays["m.layers.0.q.lora_A.weight"], arrays["m.layers.0.q.lora_B.weight"]
    np.testing.assert_allclose(B @ A, _delta(state.learned)["m.layers.0.q"], rtol=1e-4, atol=1e-5)
    assert A[2:].any(axis=1).all()
    assert not B[:, 2:].any()


@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_folds_add_up_exactly_and_their_rank_stays_possible(ranks: list[int]) -> None:
    state, total = (
        GlobalAdapter.initial([LAYERS], 4, 0),
        {name: np.zeros((10, 12)) for name in LAYERS.modules},
    )
    for number, rank in enumerate(ranks):
        stacked = _random(rank, number)
        state = state.after_fold(stacked, 4, number)
        total = {name: total[name] + delta for name, delta in _delta(stacked).items()}
    for name, delta in _delta(state.folded).items():
        np.testing.assert_allclose(delta, total[name], rtol=1e-9, atol=1e-9)
    assert state.folded is not None
    assert state.folded.rank <= 10
    assert all(not delta.any() for delta in _delta(state.learned).values())
    assert _delta(state.whole()).keys() == total.keys()


def test_a_round_changes_only_its_own_layers() -> None:
    state, update = GlobalAdapter(_random(3, 0)), _random(3, 1)
    half = LoraAdapter({"m.layers.0.q": update.modules["m.layers.0.q"]}, {})
    after = state.after(half)
    assert np.array_equal(after.learned.modules["m.layers.0.q"].A_RI, half.modules["m.layers.0.q"].A_RI)
    assert after.learned.modules["m.layers.5.q"] is state.learned.modules["m.layers.5.q"]
