"""int4, int5 and stochastic rounding: bounds on any tensor, hostile payloads, the same bytes every time."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightbeam.common.errors import CodecError, NonFiniteError
from tightbeam.common.wire.codecs import CODECS, base, codec
from tightbeam.common.wire.codecs.packing import pack, packed_widths, unpack
from tightbeam.common.wire.codecs.rotated import BLOCK, CHANNELS_PER_OUTLIER, LIMIT, hadamard_, signs

ROTATED = ["int4", "int5", "int4s", "int5s"]
INTEGER = ["int8", "int8s", *ROTATED]
STOCHASTIC = ["int8s", "int5s", "int4s"]
TINY = torch.finfo(torch.float32).tiny

sizes = st.sampled_from([1, 2, 3, 31, 63, 64, 65, 100, 127, 128, 192, 576, 640])
shapes = st.tuples(st.integers(1, 5), sizes)
seeds = st.integers(0, 2**32)


def scales_of(name: str, payload: Tensor, shape: tuple[int, int]) -> Tensor:
    """bf16 scales `[N, G]`, the first plane."""
    width = codec(name).planes(shape[1])[0]
    return payload[: shape[0] * width].view(torch.bfloat16).view(shape[0], -1).float()


def block_norms(values_ND: Tensor) -> Tensor:
    """Norms over each block that shares a scale, `[N, G]`."""
    size, norms, start = values_ND.shape[1], [], 0
    widths = [BLOCK] * (size // BLOCK) + [1 << b for b in reversed(range(6)) if size >> b & 1]
    for width in widths:
        norms.append(values_ND[:, start : start + width].double().norm(dim=1))
        start += width
    return torch.stack(norms, 1)


def widths_of(size: int) -> Tensor:
    tails = [1 << b for b in reversed(range(6)) if size >> b & 1]
    return torch.tensor([BLOCK] * (size // BLOCK) + tails, dtype=torch.float64)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Activations as they come: spread over many powers of two, with zero rows and outliers."""
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(seeds))
    values_ND = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-42, 28))
    if draw(st.booleans()):
        values_ND[torch.randint(shape[0], (1,), generator=generator)] = 0.0
    for _ in range(draw(st.integers(0, 4))):
        row, column = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
        values_ND[row, column] = draw(st.floats(-LIMIT, LIMIT, width=32))
    return values_ND


@pytest.mark.parametrize("name", ROTATED)
@given(values_ND=tensors(), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_the_error_of_every_block_is_bounded_by_its_scale(name: str, values_ND: Tensor, seed: int) -> None:
    which, shape = codec(name), (values_ND.shape[0], values_ND.shape[1])
    payload = which.encode(values_ND, seed=seed)
    assert payload.dtype == torch.uint8
    assert payload.numel() == which.num_bytes(shape)
    decoded_ND = which.decode(payload, shape, torch.float32)
    assert decoded_ND.shape == values_ND.shape
    error_NG = block_norms(decoded_ND.double() - values_ND.double())
    rounding_NG = 4e-6 * block_norms(values_ND) + 2**-140
    bound_NG = 1.07 * scales_of(name, payload, shape).double().abs() * widths_of(shape[1]).sqrt()
    assert bool((error_NG <= bound_NG + rounding_NG).all())


@pytest.mark.parametrize("name", ROTATED)
def test_the_bound_is_one_that_a_wrong_payload_breaks(name: str) -> None:
    values_ND = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    payload = codec(name).encode(values_ND)
    bound_NG = 1.07 * scales_of(name, payload, (2, 64)).double().abs() * 8
    payload[4:] = payload[4:].flip(0)
    wrong_ND = codec(name).decode(payload, (2, 64), torch.float32)
    assert bool((block_norms(wrong_ND - values_ND) > bound_NG).any())


@given(shape=shapes, seed=seeds, name=st.sampled_from(["int8", "int8s"]))
@settings(deadline=None)
def test_int8_is_within_its_scale(shape: tuple[int, int], seed: int, name: str) -> None:
    values_ND = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    payload = codec(name).encode(values_ND, seed=seed)
    scale_N1 = payload[: 4 * shape[0]].view(torch.float32)[:, None]
    error_ND = (codec(name).decode(payload, shape, torch.float32) - values_ND).abs()
    assert bool((error_ND <= scale_N1 * (1.0001 if name == "int8s" else 0.5001)).all())


@pytest.mark.parametrize("name", ROTATED)
def test_outliers_leave_the_others_alone(name: str) -> None:
    quiet_ND = torch.randn(8, 576, generator=torch.Generator().manual_seed(5))
    loud_ND = quiet_ND.clone()
    loud_ND[:, [17, 308, 400, 507]] = torch.tensor([4096.0, -16384.0, 2048.0, 1e4])
    which = codec(name)
    errors = []
    for values_ND in (quiet_ND, loud_ND):
        decoded_ND = which.decode(which.encode(values_ND), values_ND.shape, torch.float32)
        errors.append((decoded_ND - values_ND)[:, :256].norm() / quiet_ND[:, :256].norm())
    assert errors[1] < 1.3 * errors[0]
    plain = codec("int8")
    crushed_ND = plain.decode(plain.encode(loud_ND), loud_ND.shape, torch.float32)
    assert (crushed_ND - loud_ND)[:, :256].norm() / quiet_ND[:, :256].norm() > 5 * errors[1]


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40, TINY, LIMIT, -LIMIT])
@pytest.mark.parametrize("shape", [(1, 1), (2, 64), (3, 200)])
def test_constant_tensors(name: str, value: float, shape: tuple[int, int]) -> None:
    values_ND = torch.full(shape, value)
    decoded_ND = codec(name).decode(codec(name).encode(values_ND), shape, torch.float32)
    error, norm = (decoded_ND - values_ND).double().norm(), values_ND.double().norm()
    assert error <= 0.4 * norm + 100 * TINY
    if value == 0.0 and not name.endswith("s"):
        assert not decoded_ND.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", INTEGER)
def test_every_dtype_comes_back_finite(name: str, dtype: torch.dtype) -> None:
    # the largest float16 beside its like: rounding leads beyond it, and must not end in Inf
    largest = min(torch.finfo(dtype).max, LIMIT)
    values_ND = torch.full((2, 128), largest, dtype=dtype)
    values_ND[1, ::3] *= -1
    decoded_ND = codec(name).decode(codec(name).encode(values_ND), (2, 128), dtype)
    assert decoded_ND.dtype == dtype
    assert bool(decoded_ND.isfinite().all())


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    values_ND = torch.randn(3, 192)
    values_ND[1, 77] = bad
    with pytest.raises(NonFiniteError, match=name):
        codec(name).encode(values_ND)


@pytest.mark.parametrize("name", ROTATED)
def test_magnitudes_whose_sums_overflow_are_refused(name: str) -> None:
    with pytest.raises(NonFiniteError, match="magnitudes above"):
        codec(name).encode(torch.tensor([[1.0, 2 * LIMIT]]))


@given(
    data=st.data(), name=st.sampled_from(INTEGER), shape=shapes, dtype=st.sampled_from(["32", "16", "b16"])
)
@settings(deadline=None, max_examples=300)
def test_hostile_payloads_decode_to_finite_values_or_a_codec_error(
    data: st.DataObject, name: str, shape: tuple[int, int], dtype: str
) -> None:
    size = codec(name).num_bytes(shape)
    raw = torch.randint(256, (size,), generator=torch.Generator().manual_seed(data.draw(seeds)))
    payload = raw.to(torch.uint8)
    # all ones, or few high bytes, reach scales and places that random bytes do not
    payload[: data.draw(st.integers(0, size))] = data.draw(st.sampled_from([0, 1, 0x7F, 0xFF]))
    kind = {"32": torch.float32, "16": torch.float16, "b16": torch.bfloat16}[dtype]
    try:
        decoded_ND = codec(name).decode(payload, shape, kind)
    except CodecError:
        return
    assert bool(decoded_ND.isfinite().all())
    assert decoded_ND.shape == shape


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize(
    ("plane", "word"), [(0, 0x7FC0), (0, 0xFF80), (0, 0x7F7F), (1, 576), (1, 0xFFFF), (2, 0x7F80)]
)
def test_each_hostile_field_is_named(name: str, plane: int, word: int) -> None:
    """NaN, Inf and huge scales; places beyond the row; Inf outliers."""
    payload = codec(name).encode(torch.randn(2, 576))
    start = 2 * sum(codec(name).planes(576)[:plane])
    payload[start : start + 2] = torch.tensor([word & 255, word >> 8], dtype=torch.uint8)
    with pytest.raises(CodecError, match="channels beyond" if plane == 1 else "not finite"):
        codec(name).decode(payload, (2, 576), torch.float32)


@pytest.mark.parametrize("name", sorted(CODECS))
@given(shape=shapes, wrong=st.integers(-4, 4).filter(bool))
@settings(deadline=None, max_examples=20)
def test_a_wrong_length_is_refused(name: str, shape: tuple[int, int], wrong: int) -> None:
    num_bytes = max(codec(name).num_bytes(shape) + wrong, 0)
    with pytest.raises(CodecError, match="bytes"):
        codec(name).decode(torch.zeros(num_bytes, dtype=torch.uint8), shape, torch.float32)


def test_more_channels_than_a_place_can_name_are_refused() -> None:
    with pytest.raises(CodecError, match="65536 channels"):
        codec("int4").num_bytes((1, 2**16 + 1))
    assert codec("int4").num_bytes((1, 2**16)) > 2**15


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_is_right_on_average(name: str) -> None:
    values_ND = torch.randn(1, 192, generator=torch.Generator().manual_seed(11)) * torch.linspace(
        0.01, 3, 192
    )
    num_draws = 2000
    copies_MD = values_ND.expand(num_draws, -1)
    draws_MD = codec(name).decode(codec(name).encode(copies_MD, seed=1), copies_MD.shape, torch.float32)
    deviation_D = (draws_MD.double().mean(0) - values_ND[0]).abs()
    standard_error_D = draws_MD.std(0) / num_draws**0.5
    # 192 channels: 4.5 standard errors are passed by chance once in a thousand such tests
    assert bool((deviation_D <= 4.5 * standard_error_D + 1e-5).all())


@pytest.mark.parametrize("name", ["int8", "int5", "int4"])
def test_the_average_test_sees_the_bias_of_the_nearest(name: str) -> None:
    values_ND = torch.randn(1, 192, generator=torch.Generator().manual_seed(11)) * torch.linspace(
        0.01, 3, 192
    )
    copies_MD = values_ND.expand(10, -1)
    draws_MD = codec(name).decode(codec(name).encode(copies_MD), copies_MD.shape, torch.float32)
    assert not draws_MD.std(0).any()
    assert float((draws_MD.mean(0) - values_ND[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_seed_gives_its_bytes_again_and_another_does_not(name: str) -> None:
    values_ND = torch.randn(16, 576, generator=torch.Generator().manual_seed(2))
    first, again, other = (codec(name).encode(values_ND, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    codec(name).encode(values_ND, seed=9)
    assert torch.equal(state, torch.get_rng_state()), "the run's own random numbers are not touched"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", INTEGER)
def test_one_thread_and_two_make_the_same_bytes(name: str) -> None:
    values_ND = torch.randn(700, 576, generator=torch.Generator().manual_seed(4))
    payloads, decoded = [], []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        payloads.append(codec(name).encode(values_ND, seed=3))
        decoded.append(codec(name).decode(payloads[-1], values_ND.shape, torch.float32))
    assert torch.equal(payloads[0], payloads[1])
    assert torch.equal(payloads[0], payloads[2])
    assert torch.equal(decoded[0], decoded[1])


@pytest.mark.parametrize("size", [31, 200, 576])
@pytest.mark.parametrize("name", INTEGER)
def test_pieces_make_the_bytes_that_one_pass_makes(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values_ND = torch.randn(50, size, generator=torch.Generator().manual_seed(8))
    whole = codec(name).encode(values_ND, seed=3)
    decoded_ND = codec(name).decode(whole, values_ND.shape, torch.float32)
    monkeypatch.setattr(base, "CACHED_VALUES", 7 * size)
    assert torch.equal(codec(name).encode(values_ND, seed=3), whole)
    assert torch.equal(codec(name).decode(whole, values_ND.shape, torch.float32), decoded_ND)


@pytest.mark.parametrize("size", [1, 31, 64, 200, 576])
@pytest.mark.parametrize("name", ["int4", "int5"])
def test_decoding_is_scaling_and_butterflies_to_the_bit(name: str, size: int) -> None:
    """As written down in docs/codecs.md, with sums that round; autocast must not reach the product either."""
    which, shape = codec(name), (20, size)
    values_ND = torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 1e-3
    payload = which.encode(values_ND)
    scales, places, outliers, *codes = payload.split([20 * width for width in which.planes(size)])
    scale_NG = scales.view(torch.bfloat16).view(20, -1).float()
    widths = [int(width) for width in widths_of(size)]
    codes_ND = unpack([plane.view(20, -1) for plane in codes], size).float() - 2 ** (int(name[-1]) - 1)
    rows = [
        hadamard_(codes_NB * scale_NG[:, [group]]) for group, codes_NB in enumerate(codes_ND.split(widths, 1))
    ]
    plain_ND = torch.cat(rows, 1) * torch.tensor([signs()[i % BLOCK] for i in range(size)])
    place_NK = places.view(torch.int16).view(20, -1).long() if places.numel() else torch.zeros(20, 0).long()
    plain_ND.scatter_add_(1, place_NK, outliers.view(torch.bfloat16).view(place_NK.shape).float())
    assert torch.equal(which.decode(payload, shape, torch.float32), plain_ND)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(which.decode(payload, shape, torch.float32), plain_ND)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["int8", "int5", "int4"])
def test_a_gpu_makes_and_reads_the_same_bytes(name: str) -> None:
    values_ND = torch.randn(700, 576, generator=torch.Generator().manual_seed(4))
    payload = codec(name).encode(values_ND)
    assert torch.equal(codec(name).encode(values_ND.cuda()), payload)
    there_ND = codec(name).decode(payload, values_ND.shape, torch.float32, device="cuda")
    assert there_ND.device.type == "cuda"
    assert torch.equal(there_ND.cpu(), codec(name).decode(payload, values_ND.shape, torch.float32))


@pytest.mark.parametrize("name", ["bf16", "int8", "int5", "int4"])
def test_a_token_is_coded_alone_and_can_be_cut_out(name: str) -> None:
    values_ND = torch.randn(5, 576, generator=torch.Generator().manual_seed(6))
    whole, row = codec(name).encode(values_ND), codec(name).encode(values_ND[3:4])
    cut, offset = [], 0
    for width in codec(name).planes(576):
        cut.append(whole[offset + 3 * width : offset + 4 * width])
        offset += 5 * width
    assert torch.equal(torch.cat(cut), row)


def test_bytes_per_token() -> None:
    """SmolLM2's 576 channels: 9 scales, 4 outliers of 4 bytes, and the codes."""
    assert 576 // CHANNELS_PER_OUTLIER == 4
    assert codec("int4").planes(576) == (18, 8, 8, 288)
    assert codec("int4").num_bytes((1, 576)) == 322
    assert codec("int5").planes(576) == (18, 8, 8, 288, 72)
    assert codec("int5").num_bytes((1, 576)) == 394


@given(rows=st.integers(1, 4), size=st.integers(1, 70), bits=st.sampled_from([4, 5]), seed=seeds)
@settings(deadline=None)
def test_codes_are_packed_without_loss(rows: int, size: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes_ND = torch.randint(2**bits, (rows, size), generator=generator).to(torch.uint8)
    planes = [plane.reshape(-1) for plane in pack(codes_ND, bits)]
    assert [plane.numel() for plane in planes] == [rows * width for width in packed_widths(size, bits)]
    assert torch.equal(unpack([plane.view(rows, -1) for plane in planes], size), codes_ND)


def test_packing_is_as_documented() -> None:
    codes_ND = torch.tensor([[1, 18, 3, 4, 21]], dtype=torch.uint8)
    nibbles, high = pack(codes_ND, 5)
    assert nibbles.tolist() == [[1 | 4 << 4, 2 | 5 << 4, 3]]
    assert high.tolist() == [[0b10010]]


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_the_transform_is_the_walsh_hadamard_matrix(width: int) -> None:
    index = torch.arange(width)
    parity = torch.tensor([[bin(int(i & j)).count("1") % 2 for j in index] for i in index])
    expected = (1 - 2 * parity).double() / width**0.5
    assert torch.allclose(hadamard_(torch.eye(width)).double(), expected, atol=1e-7)
    assert torch.allclose(hadamard_(hadamard_(torch.eye(width))), torch.eye(width), atol=1e-6)


def test_the_signs_are_the_published_ones() -> None:
    word = sum(1 << i for i, sign in enumerate(signs()) if sign < 0)
    assert word == int.from_bytes(bytes.fromhex("fb9f451e928efcfc"), "little")
