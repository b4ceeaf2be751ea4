"""The codecs that every cloud speaks: fp32 and bf16 keep values, int8 keeps them within half a step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightbeam.common.errors import CodecError, NonFiniteError
from tightbeam.common.wire.codecs import CODECS, codec, lossless

_BASIC = ["fp32", "bf16", "int8"]
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def _any_bits(shape: tuple[int, ...], seed: int) -> Tensor:
    """Every float32 that there is: denormals, infinities, NaNs with payloads."""
    bits = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.int32).view(torch.float32)


def _spread(shape: tuple[int, ...], seed: int) -> Tensor:
    """Finite values over many powers of two."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-30, 30, shape, generator=generator)
    return torch.randn(shape, generator=generator) * torch.pow(2.0, powers)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(_BITS[one.dtype]), other.view(_BITS[other.dtype]))


@given(shape=shapes, seed=st.integers(0, 2**32))
def test_fp32_keeps_every_bit(shape: tuple[int, ...], seed: int) -> None:
    values = _any_bits(shape, seed)
    payload = codec("fp32").encode(values)
    assert _same_bits(codec("fp32").decode(payload, shape, torch.float32), values)


@given(shape=shapes, seed=st.integers(0, 2**32))
def test_bf16_keeps_bf16_and_rounds_the_rest(shape: tuple[int, ...], seed: int) -> None:
    values = _spread(shape, seed)
    rounded = codec("bf16").decode(codec("bf16").encode(values), shape, torch.float32)
    assert ((rounded - values).abs() <= values.abs() * 2**-8).all()  # 8 bits of mantissa, one of them implied
    again = codec("bf16").encode(rounded.bfloat16())
    assert torch.equal(codec("bf16").decode(again, shape, torch.bfloat16).float(), rounded)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_floats_preserve_what_is_not_finite(name: str) -> None:
    values = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0]])
    decoded = codec(name).decode(codec(name).encode(values), (1, 6), torch.float32)
    torch.testing.assert_close(decoded, values, rtol=0, atol=0, equal_nan=True)
    assert math.copysign(1.0, float(decoded[0, 4])) == -1.0


@given(shape=shapes, seed=st.integers(0, 2**32))
def test_int8_is_within_half_a_step_of_its_token(shape: tuple[int, ...], seed: int) -> None:
    values = _spread(shape, seed)
    decoded = codec("int8").decode(codec("int8").encode(values), shape, torch.float32)
    step = values.abs().amax(-1, keepdim=True) / 127
    # half a step, and the rounding of scale and product in float32
    assert ((decoded - values).abs() <= step / 2 * (1 + 1e-4) + torch.finfo(torch.float32).tiny).all()


def test_an_outlier_costs_only_its_own_token() -> None:
    values_ND = _spread((4, 64), 0).clamp(-1, 1)
    values_ND[1, 5] = 1e30
    decoded_ND = codec("int8").decode(codec("int8").encode(values_ND), (4, 64), torch.float32)
    others_N = torch.tensor([True, False, True, True])
    assert (decoded_ND - values_ND)[others_N].abs().max() <= 1 / 254 + 1e-6
    assert decoded_ND[1, 5] == pytest.approx(1e30, rel=1e-6)


@pytest.mark.parametrize("name", _BASIC)
def test_rows_of_zeros_stay_zero(name: str) -> None:
    values_ND = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0], [-0.0, 0.0, 0.0]])
    decoded_ND = codec(name).decode(codec(name).encode(values_ND), (3, 3), torch.float32)
    assert (decoded_ND[[0, 2]] == 0).all()
    assert (decoded_ND[1] != 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_int8_refuses_what_it_cannot_scale(bad: float) -> None:
    values_ND = torch.ones(3, 4)
    values_ND[2, 1] = bad
    with pytest.raises(NonFiniteError, match="learning rate"):
        codec("int8").encode(values_ND)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_int8_refuses_a_hostile_scale(bad: float) -> None:
    payload = codec("int8").encode(torch.ones(2, 4)).clone()
    payload[:4] = torch.tensor([bad]).view(torch.uint8)
    with pytest.raises(CodecError, match="not finite"):
        codec("int8").decode(payload, (2, 4), torch.float32)


@given(name=st.sampled_from(_BASIC), shape=shapes, dtype=dtypes, seed=st.integers(0, 2**32))
def test_a_payload_has_the_length_that_was_announced(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    values = _spread(shape, seed).clamp(-1000, 1000).to(dtype)
    payload = codec(name).encode(values)
    assert payload.dtype == torch.uint8
    assert payload.is_contiguous()
    assert payload.shape == (codec(name).num_bytes(shape),)
    decoded = codec(name).decode(payload, shape, dtype)
    assert decoded.dtype == dtype
    assert decoded.shape == shape


@given(name=st.sampled_from(sorted(CODECS)), extra=st.integers(-40, 40).filter(bool))
def test_a_payload_of_another_length_is_refused(name: str, extra: int) -> None:
    payload = torch.zeros(max(codec(name).num_bytes((3, 4)) + extra, 0), dtype=torch.uint8)
    with pytest.raises(CodecError, match=r"has \d+ bytes, not \d+"):
        codec(name).decode(payload, (3, 4), torch.float32)


@settings(max_examples=200)
@given(name=st.sampled_from(sorted(CODECS)), data=st.data())
def test_random_payloads_give_a_tensor_or_a_codec_error(name: str, data: st.DataObject) -> None:
    size = codec(name).num_bytes((3, 4))
    payload = torch.tensor(list(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    try:
        decoded = codec(name).decode(payload, (3, 4), torch.float32)
    except CodecError:
        return
    assert decoded.shape == (3, 4)
    assert name in ("fp32", "bf16") or decoded.isfinite().all()


@pytest.mark.parametrize("name", _BASIC)
def test_a_strided_or_attached_tensor_is_coded_as_it_reads(name: str) -> None:
    values_ND = torch.arange(24.0).reshape(4, 6).requires_grad_()
    turned_DN = values_ND.T
    payload = codec(name).encode(turned_DN)
    assert torch.equal(payload, codec(name).encode(turned_DN.detach().contiguous().clone()))
    assert not payload.requires_grad


def test_an_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(CodecError, match=r"Unknown codec 'zip'.*fp32, bf16, int8"):
        codec("zip")


def test_lossless_is_lossless() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = _any_bits((2, 8), 3).nan_to_num(0.0, 0.0, 0.0).clamp(-1e4, 1e4).to(dtype)
        name = lossless(dtype)
        assert torch.equal(codec(name).decode(codec(name).encode(values), (2, 8), dtype), values)
    assert lossless(torch.bfloat16) == "bf16"
