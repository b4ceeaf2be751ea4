"""PEFT's names to factors and back, with the scale in B; whatever does not fit is refused and named."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.lora_states import HEAD, LAYERS, State, random_state
from tightbeam.common.errors import TightbeamError, UpdateRefusedError
from tightbeam.federation.math import LoraModule, Update, check_update, fold, parse_adapter

Q_PROJ, DOWN_PROJ = LAYERS
A_NAME, B_NAME = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"


def module(rank: int, seed: int = 0) -> LoraModule:
    return parse_adapter(random_state(rank, seed), 1.0, "ward").modules[Q_PROJ]


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0, 16 / 3])
def test_parsing_and_writing_gives_the_same_file(scale: float) -> None:
    state = random_state(rank=4)
    written = parse_adapter(state, scale, "ward").state(scale)
    assert list(written) == sorted(state)
    for name, tensor in state.items():
        assert written[name].dtype == np.float32
        np.testing.assert_array_equal(written[name], tensor)


def test_the_scale_is_in_b() -> None:
    state = random_state(rank=4)
    adapter = parse_adapter(state, 8.0, "ward")
    expected = 8.0 * state[B_NAME].astype(np.float64) @ state[A_NAME].astype(np.float64)
    np.testing.assert_allclose(adapter.modules[Q_PROJ].delta_w(), expected)
    assert adapter.modules.keys() == LAYERS.keys()
    assert list(adapter.rest) == [HEAD]


def test_a_receiver_with_another_scale_gets_the_same_delta_w() -> None:
    adapter = parse_adapter(random_state(rank=4), 8.0, "ward")
    read_back = parse_adapter(adapter.state(0.5), 0.5, "other")
    for layer in LAYERS:
        np.testing.assert_allclose(
            read_back.modules[layer].delta_w(), adapter.modules[layer].delta_w(), atol=1e-4
        )


def test_an_embedding_has_factors_too() -> None:
    rng = np.random.default_rng(0)
    state = {
        "base_model.model.model.embed_tokens.lora_embedding_A": rng.normal(size=(4, 100)),
        "base_model.model.model.embed_tokens.lora_embedding_B": rng.normal(size=(16, 4)),
    }
    adapter = parse_adapter(state, 1.0, "ward")
    assert adapter.shapes() == {"base_model.model.model.embed_tokens": (16, 100)}
    assert adapter.state(1.0).keys() == state.keys()


def test_what_only_looks_like_a_factor_is_rest() -> None:
    state = random_state(4) | {f"{Q_PROJ}.lora_B.bias": np.ones(24, np.float32)}
    assert set(parse_adapter(state, 1.0, "ward").rest) == {HEAD, f"{Q_PROJ}.lora_B.bias"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_names_are_those_of_a_real_peft_adapter() -> None:
    """The one test that needs torch: what PEFT writes today is what we read."""
    import peft

    from support.tiny import tiny_model

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"])
    model = peft.get_peft_model(tiny_model("llama", tie_word_embeddings=False), config)
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    state: dict[str, NDArray[Any]] = {name: tensor.numpy() for name, tensor in tensors.items()}
    adapter = parse_adapter(state, 2.0, "ward")
    assert adapter.rest == {}
    assert 2 * len(adapter.modules) == len(state)
    assert adapter.state(2.0).keys() == state.keys()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [A_NAME, B_NAME, HEAD])
def test_a_value_that_is_no_number_is_refused(name: str, bad: float) -> None:
    state = random_state(4)
    state[name].flat[3] = bad
    with pytest.raises(UpdateRefusedError, match=f"ward-7.*{name} holds 1 of "):
        parse_adapter(state, 1.0, "ward-7")


def without(name: str) -> State:
    return {key: tensor for key, tensor in random_state(4).items() if key != name}


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (without(A_NAME), f"{B_NAME} comes without the other factor"),
        (without(B_NAME), f"{A_NAME} comes without the other factor"),
        (random_state(4) | {B_NAME: np.zeros((24, 3), np.float32)}, f"{B_NAME} has shape"),
        (random_state(4) | {A_NAME: np.zeros((4, 3, 3), np.float32)}, f"{A_NAME} has shape"),
        (
            random_state(4) | {A_NAME: np.zeros((0, 32), np.float32), B_NAME: np.zeros((24, 0), np.float32)},
            f"{B_NAME} has shape",
        ),
    ],
)
def test_a_lonely_or_wrong_factor_is_refused(state: State, why: str) -> None:
    with pytest.raises(UpdateRefusedError, match=f"ward-7 is refused: {why}"):
        parse_adapter(state, 1.0, "ward-7")


def test_integers_are_refused() -> None:
    integers: Any = np.zeros((4, 32), np.int64)
    with pytest.raises(UpdateRefusedError, match=f"{A_NAME} holds int64, not floats"):
        parse_adapter(random_state(4) | {A_NAME: integers}, 1.0, "ward-7")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(UpdateRefusedError, match="scale of ward-7"):
        parse_adapter(random_state(4), scale, "ward-7")


def test_an_update_is_held_against_the_adapter_that_was_sent() -> None:
    sent = parse_adapter(random_state(8), 1.0, "server")
    check_update(Update("ward", 1.0, random_state(2), 4.0), sent)  # another rank is fine
    wrong_shape = random_state(4) | {A_NAME: np.zeros((4, 33), np.float32)}
    for state, why in [
        (wrong_shape, rf"{Q_PROJ} is for shape \[24, 33\], not \[24, 32\]"),
        (without(HEAD), f"{HEAD} is missing"),
        (random_state(4) | {"extra": np.zeros(3, np.float32)}, "extra is not a part"),
    ]:
        with pytest.raises(UpdateRefusedError, match=f"ward-7 is refused: {why}") as refusal:
            check_update(Update("ward-7", 1.0, state, 1.0), sent)
        assert refusal.value.cure
        assert isinstance(refusal.value, TightbeamError)


@pytest.mark.parametrize("weight", [0.0, -3.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    sent = parse_adapter(random_state(4), 1.0, "server")
    with pytest.raises(UpdateRefusedError, match="ward-7 is refused: its weight"):
        check_update(Update("ward-7", weight, random_state(4), 1.0), sent)


def test_padding_changes_nothing_and_widening_gives_rows_that_learn() -> None:
    narrow, rng = module(4), np.random.default_rng(0)
    np.testing.assert_array_equal(narrow.padded(9).delta_w(), narrow.delta_w())
    wide = narrow.resized(9, rng)
    np.testing.assert_allclose(wide.delta_w(), narrow.delta_w(), rtol=1e-12)
    assert wide.rank == 9
    assert np.all(np.abs(wide.A_RI[4:]).max(axis=1) > 0)
    assert not wide.B_OR[:, 4:].any()
    np.testing.assert_array_equal(narrow.resized(2, rng).A_RI, narrow.A_RI[:2])


def test_a_restart_is_zero_and_the_same_for_all_ranks() -> None:
    adapter = parse_adapter(random_state(4), 1.0, "ward")
    small, large = adapter.restarted(2, seed=5), adapter.restarted(6, seed=5)
    for layer in LAYERS:
        assert not large.modules[layer].delta_w().any()
        np.testing.assert_array_equal(small.modules[layer].A_RI, large.modules[layer].A_RI[:2])
    other = adapter.restarted(6, seed=6)
    assert not np.array_equal(other.modules[Q_PROJ].A_RI, large.modules[Q_PROJ].A_RI)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_folding_adds_delta_w(dtype: type[np.floating[Any]]) -> None:
    low_rank, rng = module(4), np.random.default_rng(0)
    weight = rng.normal(size=(24, 32)).astype(dtype)
    folded = fold(weight, low_rank)
    assert folded.dtype == dtype
    np.testing.assert_allclose(
        folded, weight + low_rank.delta_w(), rtol=1e-6 if dtype is np.float32 else 1e-3
    )
    np.testing.assert_array_equal(fold(weight.T, low_rank, transposed=True), folded.T)
