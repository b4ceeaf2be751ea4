"""Delta coding: both ends agree bit for bit or say so, whatever is evicted, resumed, resent or corrupted."""

import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from safetensors.torch import load_file, save_file
from torch import Tensor

from tightbeam.common.errors import CodecError, NonFiniteError, ProtocolError, UnknownBaseError
from tightbeam.common.wire.codecs import codec
from tightbeam.common.wire.delta import CHECK_BYTES, KEY_BYTES, Delta, DeltaDecoder, DeltaEncoder

SIZE = 96
PLENTY = 1 << 30
ROOM_FOR_TWO = 2 * 5 * SIZE * 2  # bytes of two samples of five tokens in bfloat16


def key(sample: int) -> bytes:
    return hashlib.blake2b(bytes([sample]), digest_size=KEY_BYTES).digest()


def rows(seed: int, num_tokens: int = 5) -> Tensor:
    return torch.randn(num_tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def relative_error(decoded: Tensor, wanted: Tensor) -> float:
    return float((decoded.float() - wanted).norm() / wanted.norm())


def cross(encoder: DeltaEncoder, decoder: DeltaDecoder, values: Tensor, sample: int) -> Tensor:
    delta, expected = encoder.encode(values, [len(values)], [key(sample)])
    decoded = decoder.decode(delta, [len(values)], SIZE)
    assert torch.equal(decoded, expected)
    return decoded


@pytest.mark.parametrize("name", ["int4", "int5", "int8", "int4s", "bf16"])
def test_what_does_not_move_is_known_ever_better(name: str) -> None:
    encoder, decoder = DeltaEncoder(name, PLENTY), DeltaDecoder(PLENTY)
    errors = [relative_error(cross(encoder, decoder, rows(0), 1), rows(0)) for _ in range(6)]
    assert errors[-1] < 3e-3  # what bfloat16 leaves
    if name == "int4":
        assert errors[1] < errors[0] / 5


def test_a_small_move_costs_a_small_error() -> None:
    """The bytes are the same, the error is relative to the move: the reason for delta coding."""
    encoder, decoder, plain = DeltaEncoder("int4", PLENTY), DeltaDecoder(PLENTY), codec("int4")
    values = rows(0)
    for epoch in range(1, 9):
        values = values + 0.05 * rows(epoch)
        error = relative_error(cross(encoder, decoder, values, 1), values)
        direct = relative_error(plain.decode(plain.encode(values), values.shape, torch.float32), values)
        assert error < direct / 4 or epoch < 3


def test_several_segments_keep_their_own_bases() -> None:
    encoder, decoder = DeltaEncoder("int5", PLENTY), DeltaDecoder(PLENTY)
    lengths, keys = [3, 1, 4], [key(1), key(2), key(3)]
    packed = rows(0, 8)
    encoder.encode(packed, lengths, keys)[0]
    delta, _ = encoder.encode(packed, lengths, keys)
    with pytest.raises(UnknownBaseError):
        decoder.decode(delta, lengths, SIZE)  # it never saw the first
    encoder.forget(keys[:2])
    delta, _ = encoder.encode(packed, lengths, keys)
    assert [len(base) for base in delta.bases] == [0, 0, CHECK_BYTES]
    encoder.forget(keys)
    delta, expected = encoder.encode(packed, lengths, keys)
    assert torch.equal(decoder.decode(delta, lengths, SIZE), expected)
    order = [key(3), key(1)]
    again = torch.cat([packed[4:], packed[:3]])
    delta, expected = encoder.encode(again, [4, 3], order)
    assert all(delta.bases)
    assert torch.equal(decoder.decode(delta, [4, 3], SIZE), expected)


def test_bytes_are_payload_keys_and_digests() -> None:
    encoder = DeltaEncoder("int4", PLENTY)
    first, _ = encoder.encode(rows(0, 7), [3, 4], [key(1), b""])
    assert first.num_bytes == codec("int4").num_bytes((7, SIZE)) + KEY_BYTES
    second, _ = encoder.encode(rows(0, 7), [3, 4], [key(1), b""])
    assert second.num_bytes == first.num_bytes + CHECK_BYTES
    assert encoder.state_bytes == 3 * SIZE * 2


def test_a_sample_that_comes_twice_is_remembered_once() -> None:
    encoder, decoder = DeltaEncoder("int8", PLENTY), DeltaDecoder(PLENTY)
    delta, expected = encoder.encode(rows(0, 6), [3, 3], [key(1), key(1)])
    assert delta.keys == (key(1), b"")
    assert torch.equal(decoder.decode(delta, [3, 3], SIZE), expected)
    cross(encoder, decoder, rows(1, 3), 1)


def test_a_step_sent_again_decodes_to_the_same_and_the_next_one_still_does() -> None:
    encoder, decoder = DeltaEncoder("int4", PLENTY), DeltaDecoder(PLENTY)
    cross(encoder, decoder, rows(0), 1)
    delta, expected = encoder.encode(rows(1), [5], [key(1)])
    for _ in range(3):
        assert torch.equal(decoder.decode(delta, [5], SIZE), expected)
    cross(encoder, decoder, rows(2), 1)
    with pytest.raises(UnknownBaseError):
        decoder.decode(replace(delta, bases=(b"stale678",)), [5], SIZE)


def test_eviction_at_the_receiver_is_told_and_healed() -> None:
    encoder, decoder = DeltaEncoder("int4", PLENTY), DeltaDecoder(ROOM_FOR_TWO)
    for sample in (1, 2, 3):
        cross(encoder, decoder, rows(sample), sample)
    assert decoder.state_bytes <= ROOM_FOR_TWO
    delta, _ = encoder.encode(rows(1), [5], [key(1)])
    with pytest.raises(UnknownBaseError, match="whole values"):
        decoder.decode(delta, [5], SIZE)
    encoder.forget([key(1)])
    cross(encoder, decoder, rows(1), 1)


def test_eviction_at_the_sender_needs_no_word() -> None:
    encoder, decoder = DeltaEncoder("int4", ROOM_FOR_TWO), DeltaDecoder(PLENTY)
    for sample in (1, 2, 3, 1, 2, 3):
        cross(encoder, decoder, rows(sample), sample)
        assert encoder.state_bytes <= ROOM_FOR_TWO
    delta, _ = encoder.encode(rows(1), [5], [key(1)])
    assert delta.bases == (b"",)


def test_the_least_recently_used_goes_first() -> None:
    encoder, decoder = DeltaEncoder("int4", ROOM_FOR_TWO), DeltaDecoder(PLENTY)
    for sample in (1, 2, 1, 3):
        cross(encoder, decoder, rows(sample), sample)
    kept = {name.partition(".")[2] for name in encoder.state_dict()}
    assert kept == {key(1).hex(), key(3).hex()}


def test_what_never_fits_is_not_kept() -> None:
    encoder, decoder = DeltaEncoder("int4", 10), DeltaDecoder(10)
    for _ in range(2):
        cross(encoder, decoder, rows(0), 1)
    assert encoder.state_bytes == decoder.state_bytes == 0


def test_a_saved_sender_goes_on_where_it_was(tmp_path: Path) -> None:
    encoder, decoder = DeltaEncoder("int4", PLENTY), DeltaDecoder(PLENTY)
    for sample in (2, 1):
        cross(encoder, decoder, rows(sample), sample)
    save_file(encoder.state_dict(), tmp_path / "delta.safetensors")
    resumed = DeltaEncoder("int4", PLENTY)
    resumed.load_state_dict(load_file(tmp_path / "delta.safetensors"))
    assert list(resumed.state_dict()) == list(encoder.state_dict())
    expected, _ = encoder.encode(rows(7), [5], [key(1)])
    delta, _ = resumed.encode(rows(7), [5], [key(1)])
    assert delta.bases == expected.bases
    assert torch.equal(delta.payload, expected.payload)


def test_a_sender_resumed_from_too_early_is_told() -> None:
    encoder, decoder = DeltaEncoder("int4", PLENTY), DeltaDecoder(PLENTY)
    cross(encoder, decoder, rows(0), 1)
    early = encoder.state_dict()
    for step in (1, 2):
        cross(encoder, decoder, rows(step), 1)
    resumed = DeltaEncoder("int4", PLENTY)
    resumed.load_state_dict(early)
    delta, _ = resumed.encode(rows(3), [5], [key(1)])
    with pytest.raises(UnknownBaseError):
        decoder.decode(delta, [5], SIZE)


def test_one_flipped_bit_in_a_base_is_detected() -> None:
    encoder, decoder = DeltaEncoder("int4", PLENTY), DeltaDecoder(PLENTY)
    cross(encoder, decoder, rows(0), 1)
    state = encoder.state_dict()
    (base,) = state.values()
    base.view(torch.int16)[2, 3] ^= 1
    drifted = DeltaEncoder("int4", PLENTY)
    drifted.load_state_dict(state)
    delta, _ = drifted.encode(rows(1), [5], [key(1)])
    with pytest.raises(UnknownBaseError):
        decoder.decode(delta, [5], SIZE)


def test_a_failed_decode_remembers_nothing() -> None:
    encoder, decoder = DeltaEncoder("int4", PLENTY), DeltaDecoder(PLENTY)
    cross(encoder, decoder, rows(0), 1)
    before = decoder.state_bytes
    good, expected = encoder.encode(rows(1, 8), [5, 3], [key(1), key(2)])
    with pytest.raises(UnknownBaseError):
        decoder.decode(replace(good, bases=(good.bases[0], b"unknown!")), [5, 3], SIZE)
    with pytest.raises(CodecError):
        decoder.decode(replace(good, payload=good.payload[1:]), [5, 3], SIZE)
    assert decoder.state_bytes == before
    assert torch.equal(decoder.decode(good, [5, 3], SIZE), expected)


def test_what_is_not_finite_is_refused_and_forgotten_by_nobody() -> None:
    encoder, decoder = DeltaEncoder("int4", PLENTY), DeltaDecoder(PLENTY)
    cross(encoder, decoder, rows(0), 1)
    with pytest.raises(NonFiniteError):
        encoder.encode(torch.full((5, SIZE), torch.inf), [5], [key(1)])
    cross(encoder, decoder, rows(1), 1)


def test_sums_that_are_not_finite_are_refused() -> None:
    decoder = DeltaDecoder(PLENTY)
    payload = codec("bf16").encode(torch.full((1, SIZE), torch.inf))
    with pytest.raises(CodecError, match="not finite"):
        decoder.decode(Delta("bf16", (key(1),), (b"",), payload), [1], SIZE)


@pytest.mark.parametrize(
    ("keys", "bases", "lengths"),
    [
        ((key(1),), (b"",), [2, 3]),
        ((key(1), key(2)), (b"",), [2, 3]),
        ((key(1), b"short"), (b"", b""), [2, 3]),
        ((key(1), key(2)), (b"", b"short"), [2, 3]),
        ((key(1), key(1)), (b"", b""), [2, 3]),
    ],
)
def test_malformed_deltas_are_refused(
    keys: tuple[bytes, ...], bases: tuple[bytes, ...], lengths: list[int]
) -> None:
    payload = codec("int4").encode(rows(0, 5))
    with pytest.raises(ProtocolError):
        DeltaDecoder(PLENTY).decode(Delta("int4", keys, bases, payload), lengths, SIZE)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_hostile_deltas_raise_what_is_declared(data: st.DataObject) -> None:
    decoder = DeltaDecoder(ROOM_FOR_TWO)
    for _ in range(3):
        size = codec("int4").num_bytes((5, SIZE))
        raw = torch.randint(
            256, (size,), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        )
        base = data.draw(st.sampled_from([b"", b"12345678"]))
        delta = Delta("int4", (key(data.draw(st.integers(0, 2))),), (base,), raw.to(torch.uint8))
        with contextlib.suppress(CodecError, UnknownBaseError):
            assert bool(decoder.decode(delta, [5], SIZE).isfinite().all())
        assert decoder.state_bytes <= ROOM_FOR_TWO


class TwoEnds(RuleBasedStateMachine):
    """Any order of steps, losses, restarts and resumes: what is decoded is what the sender thinks, always."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = DeltaEncoder("int4", ROOM_FOR_TWO), DeltaDecoder(2 * ROOM_FOR_TWO)
        self.saved: dict[str, Tensor] = {}

    @rule(
        samples=st.lists(st.integers(0, 4), min_size=1, max_size=3),
        seed=st.integers(0, 9),
        lost=st.booleans(),
    )
    def step(self, samples: list[int], seed: int, lost: bool) -> None:
        """A step; `lost`: the request never arrived, and the edge gave the step up."""
        lengths, keys = [5] * len(samples), [key(sample) for sample in samples]
        values = rows(seed, 5 * len(samples))
        delta, expected = self.encoder.encode(values, lengths, keys)
        if lost:
            return
        try:
            decoded = self.decoder.decode(delta, lengths, SIZE)
        except UnknownBaseError:
            self.encoder.forget(keys)
            delta, expected = self.encoder.encode(values, lengths, keys)
            decoded = self.decoder.decode(delta, lengths, SIZE)
        assert torch.equal(decoded, expected)

    @rule()
    def save(self) -> None:
        """A checkpoint at the edge."""
        self.saved = self.encoder.state_dict()

    @rule()
    def resume(self) -> None:
        """The edge starts again from its last checkpoint."""
        self.encoder = DeltaEncoder("int4", ROOM_FOR_TWO)
        self.encoder.load_state_dict(self.saved)

    @rule()
    def restart(self) -> None:
        """The cloud loses everything."""
        self.decoder = DeltaDecoder(2 * ROOM_FOR_TWO)

    @invariant()
    def bounded(self) -> None:
        """Memory stays within what was given."""
        assert self.encoder.state_bytes <= ROOM_FOR_TWO
        assert self.decoder.state_bytes <= 2 * ROOM_FOR_TWO


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(deadline=None, max_examples=40, stateful_step_count=15)
