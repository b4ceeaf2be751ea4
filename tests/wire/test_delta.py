"""Delta coding: both ends agree bit for bit or say so, whatever is evicted, resumed, resent or corrupted."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from tightbeam.common.errors import CodecError, NonFiniteError, UnknownBaseError
from tightbeam.common.wire.codecs import codec
from tightbeam.common.wire.delta import (
    CHECK_BYTES,
    KEY_BYTES,
    OVERHEAD_BYTES,
    WHOLE,
    Base,
    BaseStore,
    Samples,
    checks_of,
    decode_delta,
    encode_delta,
)

SIZE = 96
SAMPLE_BYTES = 5 * SIZE * 2 + OVERHEAD_BYTES  # five tokens in bfloat16


def key(sample: int) -> bytes:
    return hashlib.blake2b(bytes([sample]), digest_size=KEY_BYTES).digest()


def rows(seed: int, num_tokens: int = 5) -> Tensor:
    return torch.randn(num_tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def samples_of(*numbers: int, lengths: Sequence[int] | None = None) -> Samples:
    return Samples.of([key(n) for n in numbers], lengths or [5] * len(numbers), SIZE)


def relative_error(decoded: Tensor, wanted: Tensor) -> float:
    return float((decoded.float() - wanted).norm() / wanted.norm())


@dataclass(frozen=True)
class Sent:
    """A delta on its way."""

    codec: str
    samples: Samples
    checks: tuple[bytes, ...]
    payload: Tensor
    decoded: Tensor  # what the sender thinks comes out


class Leader:
    """The end that names the bases, here the sender."""

    def __init__(self, codec_name: str = "int4", max_bytes: float = float("inf")) -> None:
        self.codec, self.store = codec_name, BaseStore(max_bytes)

    def send(self, values: Tensor, samples: Samples) -> Sent:
        bases = self.store.latest(samples)
        payload, decoded = encode_delta(self.codec, values, bases, samples.lengths)
        self.store.remember(samples, decoded)
        return Sent(self.codec, samples, checks_of(bases), payload, decoded)

    @staticmethod
    def whole(sent: Sent) -> Sent:
        """The same values, relying on nothing."""
        nothing = (None,) * len(sent.checks)
        payload, decoded = encode_delta(WHOLE, sent.decoded, nothing, sent.samples.lengths)
        return Sent(WHOLE, sent.samples, checks_of(nothing), payload, decoded)


class Follower:
    """The end that looks bases up, here the receiver."""

    def __init__(self, max_bytes: float = float("inf")) -> None:
        self.store = BaseStore(max_bytes)

    def take(self, sent: Sent) -> Tensor:
        bases = self.store.find(sent.samples, sent.checks)
        decoded = decode_delta(sent.codec, sent.payload, bases, sent.samples.lengths, SIZE)
        self.store.remember(sent.samples, decoded, bases)
        return decoded


def cross(leader: Leader, follower: Follower, values: Tensor, *numbers: int) -> Tensor:
    sent = leader.send(values, samples_of(*numbers))
    decoded = follower.take(sent)
    assert torch.equal(decoded, sent.decoded)
    return decoded


@pytest.mark.parametrize("name", ["int4", "int5", "int8", "int4s", "bf16"])
def test_what_does_not_move_is_known_ever_better(name: str) -> None:
    leader, follower = Leader(name), Follower()
    errors = [relative_error(cross(leader, follower, rows(0), 1), rows(0)) for _ in range(6)]
    assert errors[-1] < 3e-3  # what bfloat16 leaves
    if name == "int4":
        assert errors[1] < errors[0] / 5


def test_a_small_move_costs_a_small_error() -> None:
    """The bytes are the same, the error is relative to the move: the reason for delta coding."""
    leader, follower, plain = Leader(), Follower(), codec("int4")
    values = rows(0)
    for epoch in range(1, 9):
        values = values + 0.05 * rows(epoch)
        error = relative_error(cross(leader, follower, values, 1), values)
        direct = relative_error(plain.decode(plain.encode(values), values.shape, torch.float32), values)
        assert error < direct / 4 or epoch < 3


def test_several_segments_keep_their_own_bases() -> None:
    leader, follower = Leader("int5"), Follower()
    samples, packed = samples_of(1, 2, 3, lengths=[3, 1, 4]), rows(0, 8)
    leader.send(packed, samples)
    second = leader.send(packed, samples)
    assert [len(check) for check in second.checks] == [CHECK_BYTES] * 3
    with pytest.raises(UnknownBaseError, match="whole values"):
        follower.take(second)  # it never saw the first
    follower.take(Leader.whole(second))
    other = samples_of(3, 1, lengths=[4, 3])
    third = leader.send(torch.cat([packed[4:], packed[:3]]), other)
    assert all(third.checks)
    assert torch.equal(follower.take(third), third.decoded)


def test_whole_values_are_the_values_that_the_delta_stands_for() -> None:
    """To the bit, and both ends can go on from them; even where a value is minus zero."""
    leader, follower = Leader(), Follower()
    leader.send(rows(0), samples_of(1))
    values = rows(1)
    values[0, :8] = -1e-45
    sent = leader.send(values, samples_of(1))
    decoded = follower.take(Leader.whole(sent))
    assert torch.equal(decoded.view(torch.int16), sent.decoded.view(torch.int16))
    cross(leader, follower, rows(2), 1)


def test_minus_zero_comes_through_whole() -> None:
    values = torch.full((5, SIZE), -0.0)
    _, decoded = encode_delta("fp32", values, (None,), (5,))
    _, again = encode_delta(WHOLE, decoded, (None,), (5,))
    assert torch.equal(decoded.view(torch.int16), again.view(torch.int16))


def test_a_sample_that_comes_twice_is_remembered_once() -> None:
    leader, follower = Leader("int8"), Follower()
    samples = samples_of(1, 1, lengths=[3, 3])
    assert samples.keys == (key(1), b"")
    sent = leader.send(rows(0, 6), samples)
    assert torch.equal(follower.take(sent), sent.decoded)
    assert len(leader.store) == len(follower.store) == 1
    assert leader.store.num_bytes == 3 * SIZE * 2 + OVERHEAD_BYTES


def test_a_step_sent_again_decodes_to_the_same_and_the_next_one_still_does() -> None:
    leader, follower = Leader(), Follower()
    cross(leader, follower, rows(0), 1)
    sent = leader.send(rows(1), samples_of(1))
    for _ in range(3):
        assert torch.equal(follower.take(sent), sent.decoded)
    cross(leader, follower, rows(2), 1)
    with pytest.raises(UnknownBaseError):
        follower.take(replace(sent, checks=(b"stale678",)))


def test_eviction_at_the_follower_is_told_and_healed() -> None:
    leader, follower = Leader(), Follower(2 * SAMPLE_BYTES)
    for sample in (1, 2, 3):
        cross(leader, follower, rows(sample), sample)
    assert follower.store.num_bytes <= 2 * SAMPLE_BYTES
    sent = leader.send(rows(1), samples_of(1))
    with pytest.raises(UnknownBaseError, match="--delta-bytes"):
        follower.take(sent)
    follower.take(Leader.whole(sent))
    cross(leader, follower, rows(1), 1)


def test_eviction_at_the_leader_needs_no_word() -> None:
    leader, follower = Leader(max_bytes=2 * SAMPLE_BYTES), Follower()
    for sample in (1, 2, 3, 1, 2, 3):
        cross(leader, follower, rows(sample), sample)
        assert leader.store.num_bytes <= 2 * SAMPLE_BYTES
    assert leader.send(rows(1), samples_of(1)).checks == (b"",)


def test_the_least_recently_used_goes_first() -> None:
    leader, follower = Leader(max_bytes=2 * SAMPLE_BYTES), Follower()
    for sample in (1, 2, 1, 3):
        cross(leader, follower, rows(sample), sample)
    kept = [bool(leader.store.latest(samples_of(n))[0]) for n in (1, 2, 3)]
    assert kept == [True, False, True]


def test_what_never_fits_is_not_kept() -> None:
    leader, follower = Leader(max_bytes=10), Follower(10)
    for _ in range(2):
        cross(leader, follower, rows(0), 1)
    assert leader.store.num_bytes == follower.store.num_bytes == 0


def test_a_sample_of_another_length_starts_anew() -> None:
    leader, follower = Leader(), Follower()
    cross(leader, follower, rows(0), 1)
    shorter = leader.send(rows(0, 4), samples_of(1, lengths=[4]))
    assert shorter.checks == (b"",)
    follower.take(shorter)


def test_one_flipped_bit_in_a_base_is_detected() -> None:
    leader, follower = Leader(), Follower()
    cross(leader, follower, rows(0), 1)
    (base,) = leader.store.latest(samples_of(1))
    assert base is not None
    drifted = base.rows.clone()
    drifted.view(torch.int16)[2, 3] ^= 1
    assert Base.of(drifted).check != base.check
    sent = leader.send(rows(1), samples_of(1))
    with pytest.raises(UnknownBaseError):
        follower.take(replace(sent, checks=(Base.of(drifted).check,)))


def test_a_base_is_a_private_copy() -> None:
    leader = Leader()
    sent = leader.send(rows(0), samples_of(1))
    before = checks_of(leader.store.latest(samples_of(1)))
    sent.decoded.zero_()
    (base,) = leader.store.latest(samples_of(1))
    assert base is not None
    assert (Base.of(base.rows).check,) == before


def test_a_failed_decode_remembers_nothing() -> None:
    leader, follower = Leader(), Follower()
    cross(leader, follower, rows(0), 1)
    before = follower.store.num_bytes
    good = leader.send(rows(1, 8), samples_of(1, 2, lengths=[5, 3]))
    with pytest.raises(UnknownBaseError):
        follower.take(replace(good, checks=(good.checks[0], b"unknown!")))
    with pytest.raises(CodecError):
        follower.take(replace(good, payload=good.payload[1:]))
    assert follower.store.num_bytes == before
    assert torch.equal(follower.take(good), good.decoded)


def test_what_is_not_finite_is_refused_and_forgotten_by_nobody() -> None:
    leader, follower = Leader(), Follower()
    cross(leader, follower, rows(0), 1)
    with pytest.raises(NonFiniteError):
        leader.send(torch.full((5, SIZE), torch.inf), samples_of(1))
    cross(leader, follower, rows(1), 1)


def test_sums_that_are_not_finite_are_refused() -> None:
    payload = codec("bf16").encode(torch.full((1, SIZE), torch.inf))
    with pytest.raises(CodecError, match="not finite"):
        decode_delta("bf16", payload, (None,), [1], SIZE)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_hostile_deltas_raise_what_is_declared(data: st.DataObject) -> None:
    follower = Follower(2 * SAMPLE_BYTES)
    for _ in range(3):
        size = codec("int4").num_bytes((5, SIZE))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        raw = torch.randint(256, (size,), generator=generator).to(torch.uint8)
        check = data.draw(st.sampled_from([b"", b"12345678"]))
        sent = Sent("int4", samples_of(data.draw(st.integers(0, 2))), (check,), raw, raw)
        try:
            assert bool(follower.take(sent).isfinite().all())
        except (CodecError, UnknownBaseError):
            continue
        finally:
            assert follower.store.num_bytes <= 2 * SAMPLE_BYTES


class TwoEnds(RuleBasedStateMachine):
    """Any order of steps, losses and restarts: what is decoded is what the sender thinks, always."""

    def __init__(self) -> None:
        super().__init__()
        self.leader, self.follower = Leader(max_bytes=2 * SAMPLE_BYTES), Follower(4 * SAMPLE_BYTES)

    @rule(
        numbers=st.lists(st.integers(0, 4), min_size=1, max_size=3),
        seed=st.integers(0, 9),
        lost=st.booleans(),
        again=st.booleans(),
    )
    def step(self, numbers: list[int], seed: int, lost: bool, again: bool) -> None:
        """A step; `lost`: it never arrived and was given up; `again`: its reply was lost."""
        sent = self.leader.send(rows(seed, 5 * len(numbers)), samples_of(*numbers))
        if lost:
            return
        for _ in range(1 + again):
            try:
                decoded = self.follower.take(sent)
            except UnknownBaseError:
                decoded = self.follower.take(Leader.whole(sent))
            assert torch.equal(decoded, sent.decoded)

    @rule()
    def leader_restarts(self) -> None:
        """The edge loses everything."""
        self.leader = Leader(max_bytes=2 * SAMPLE_BYTES)

    @rule()
    def follower_restarts(self) -> None:
        """The cloud loses everything."""
        self.follower = Follower(4 * SAMPLE_BYTES)

    @invariant()
    def bounded(self) -> None:
        """Memory stays within what was given."""
        assert self.leader.store.num_bytes <= 2 * SAMPLE_BYTES
        assert self.follower.store.num_bytes <= 4 * SAMPLE_BYTES


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(deadline=None, max_examples=40, stateful_step_count=15)
