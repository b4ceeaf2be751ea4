"""Records: what was sealed opens in its place and nowhere else, and no nonce is used twice."""

import threading
from itertools import count, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightbeam.common.errors import IntegrityError
from tightbeam.common.wire.records import (
    CHUNK_BYTES,
    RECORDS_PER_KEY,
    TAG_BYTES,
    Aead,
    Direction,
    Opener,
    Sealer,
    _Sequence,
    chunk_context,
    header_context,
    header_digest,
)

SECRET, OTHER_SECRET = b"k" * 32, b"K" * 32
SESSION, OTHER_SESSION = b"s" * 16, b"S" * 16
UP, DOWN = Direction.EDGE_TO_CLOUD, Direction.CLOUD_TO_EDGE
both_ciphers = pytest.mark.parametrize("aead", Aead)


def sealer(aead: Aead = Aead.AES_256_GCM) -> Sealer:
    return Sealer(SECRET, SESSION, UP, aead)


def opener(aead: Aead = Aead.AES_256_GCM) -> Opener:
    return Opener(SECRET, SESSION, UP, aead)


@both_ciphers
@given(messages=st.lists(st.tuples(st.binary(max_size=80), st.binary(max_size=60)), max_size=8))
def test_what_was_sealed_opens(aead: Aead, messages: list[tuple[bytes, bytes]]) -> None:
    seal, open_ = sealer(aead), opener(aead)
    for plaintext, context in messages:
        record = seal.seal(plaintext, context)
        assert len(record) == len(plaintext) + TAG_BYTES
        assert open_.open(record, context) == plaintext


@both_ciphers
def test_every_flipped_bit_is_rejected(aead: Aead) -> None:
    record = sealer(aead).seal(b"hidden state", b"context")
    for bit in range(8 * len(record)):
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            opener(aead).open(flipped, b"context")
    assert opener(aead).open(record, b"context") == b"hidden state"


@both_ciphers
def test_every_truncation_and_extension_is_rejected(aead: Aead) -> None:
    record = sealer(aead).seal(b"hidden state")
    altered = [record[:length] for length in range(len(record))]
    altered += [record[start:] for start in range(1, len(record))] + [record + b"\0", b"\0" + record]
    for wrong in altered:
        with pytest.raises(IntegrityError):
            opener(aead).open(wrong)
        with pytest.raises(IntegrityError):
            opener(aead).open_into(wrong, b"", memoryview(bytearray(12)))


# Four kinds of record with the same contents: the stream's own, another session's, the other direction's and
# one under another secret. Whatever is delivered, exactly the own ones in their places are opened.
PLAINTEXTS = [b"zero", b"one", b"", b"three", b"zero"]
CONTEXTS = [b"a", b"b", b"a", b"", b"a"]


def all_of(sealing: Sealer) -> list[bytes]:
    return [sealing.seal(plaintext, context) for plaintext, context in zip(PLAINTEXTS, CONTEXTS, strict=True)]


SOURCES = [
    all_of(sealer()),
    all_of(Sealer(SECRET, OTHER_SESSION, UP)),
    all_of(Sealer(SECRET, SESSION, DOWN)),
    all_of(Sealer(OTHER_SECRET, SESSION, UP)),
]
delivery = st.tuples(
    st.sampled_from([0, 0, 0, 0, 0, 1, 2, 3]),
    st.integers(0, 4),
    st.sampled_from([None, None, b"a", b"b", b"x"]),
)


@settings(max_examples=300)
@given(good=st.integers(0, 5), then=st.lists(delivery, min_size=1, max_size=6))
def test_only_the_next_record_opens(good: int, then: list[tuple[int, int, bytes | None]]) -> None:
    """Duplication, drop, reordering, splices across sessions, directions and contexts, in any mixture."""
    receiving, alive = opener(), True
    stream = [(0, index, None) for index in range(good)] + then
    for place, (source, index, other_context) in enumerate(stream):
        context = CONTEXTS[index] if other_context is None else other_context
        alive = alive and (source, index, context) == (0, place, CONTEXTS[index])
        if alive:
            assert receiving.open(SOURCES[source][index], context) == PLAINTEXTS[index]
        else:
            with pytest.raises(IntegrityError):
                receiving.open(SOURCES[source][index], context)


def test_an_opener_that_failed_once_opens_nothing_more() -> None:
    receiving, record = opener(), sealer().seal(b"payload")
    with pytest.raises(IntegrityError):
        receiving.open(bytes(len(record)))
    with pytest.raises(IntegrityError):
        receiving.open(record)
    with pytest.raises(IntegrityError):
        receiving.open_into(record, b"", memoryview(bytearray(7)))


def test_the_error_tells_the_cure_and_no_reason() -> None:
    messages = set()
    for record, context in ((sealer().seal(b"x"), b"other"), (b"", b""), (bytes(99), b"")):
        with pytest.raises(IntegrityError) as caught:
            opener().open(record, context)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "Connect again" in messages.pop()


@pytest.mark.parametrize("flip", [False, True])
def test_chunks_are_bound_to_header_and_place(flip: bool) -> None:
    digest = header_digest(b"step 7, forward, float32, [3, 4], fp32")
    own = chunk_context(digest, 0, 1, 3)
    others = [
        chunk_context(header_digest(b"step 8, forward, float32, [3, 4], fp32"), 0, 1, 3),
        chunk_context(digest, 1, 1, 3),
        chunk_context(digest, 0, 2, 3),
        chunk_context(digest, 0, 1, 2),
        header_context(),
    ]
    record = sealer().seal(b"chunk", own)
    if not flip:
        assert opener().open(record, own) == b"chunk"
        return
    for other in others:
        with pytest.raises(IntegrityError):
            opener().open(record, other)


@both_ciphers
@given(before=st.integers(0, 9), after=st.integers(0, 9), plaintext=st.binary(max_size=50))
def test_open_into_writes_exactly_its_bytes(aead: Aead, before: int, after: int, plaintext: bytes) -> None:
    memory = bytearray(b"\xa5" * (before + len(plaintext) + after))
    record = sealer(aead).seal(plaintext)
    opened = opener(aead).open_into(record, b"", memoryview(memory)[before : before + len(plaintext)])
    assert opened == len(plaintext)
    assert memory == b"\xa5" * before + plaintext + b"\xa5" * after


@both_ciphers
def test_a_failed_open_into_leaves_no_plaintext(aead: Aead) -> None:
    memory, record = bytearray(b"\xa5" * 64), bytearray(sealer(aead).seal(b"secret" * 8))
    record[0] ^= 1
    with pytest.raises(IntegrityError):
        opener(aead).open_into(record, b"", memoryview(memory)[:48])
    assert memory == bytes(48) + b"\xa5" * 16


@pytest.mark.parametrize("room", [0, 3, 5, 64])
def test_a_record_that_does_not_fill_its_memory_is_rejected(room: int) -> None:
    """A genuine but dishonest peer must not get a tensor of which a part is this process's old memory."""
    memory, receiving = bytearray(b"\xa5" * room), opener()
    with pytest.raises(IntegrityError):
        receiving.open_into(sealer().seal(b"four"), b"", memoryview(memory))
    assert memory == b"\xa5" * room
    assert opener().open_into(sealer().seal(b"four"), b"", memoryview(bytearray(4))) == 4


def test_tensors_are_sealed_and_opened_where_they_lie() -> None:
    source_ND = torch.randn(33, 7, dtype=torch.bfloat16)
    target_ND = torch.zeros_like(source_ND)
    record = sealer().seal(source_ND.view(torch.uint8).numpy().data)
    opener().open_into(record, b"", target_ND.view(torch.uint8).numpy().data)
    assert torch.equal(source_ND, target_ND)
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    back = np.zeros_like(rows)
    assert opener().open_into(sealer().seal(rows.data), b"", back.data) == rows.nbytes
    np.testing.assert_array_equal(rows, back)
    empty = np.zeros((0, 4), np.float32).data
    assert opener().open_into(sealer().seal(empty), b"", empty) == 0


def test_what_only_we_can_break_is_an_assertion() -> None:
    record = sealer().seal(b"four")
    with pytest.raises(AssertionError):
        opener().open_into(record, b"", memoryview(bytes(4)))
    with pytest.raises(AssertionError):
        sealer().seal(bytes(CHUNK_BYTES + 1))
    with pytest.raises(AssertionError):
        chunk_context(bytes(32), 0, 3, 3)


def test_the_longest_record_passes_and_a_longer_one_does_not() -> None:
    whole = bytes(CHUNK_BYTES)
    assert opener().open(sealer().seal(whole)) == whole
    with pytest.raises(IntegrityError):
        opener().open(bytes(CHUNK_BYTES + TAG_BYTES + 1))


def places(sequence: _Sequence, records: int) -> list[tuple[int, bytes]]:
    """Pairs of key and nonce; a key is told by its number, in order of first use."""
    key_numbers: dict[object, int] = {}  # holds the ciphers, so that no two share an address
    numbers, pairs = count(), []
    for cipher, nonce, _ in (sequence.take(b"") for _ in range(records)):
        if cipher not in key_numbers:
            key_numbers[cipher] = next(numbers)
        pairs.append((key_numbers[cipher], nonce))
    return pairs


def test_no_nonce_repeats_across_rekeys() -> None:
    pairs = places(_Sequence(SECRET, SESSION, UP, Aead.AES_256_GCM), 3 * RECORDS_PER_KEY)
    assert len(set(pairs)) == len(pairs)
    assert [key for key, _ in pairs[:: RECORDS_PER_KEY // 2]] == [0, 0, 1, 1, 2, 2]
    again = places(_Sequence(SECRET, SESSION, UP, Aead.AES_256_GCM), 2)
    assert again == list(islice(pairs, 2)), "the check above would see a repetition"


def test_keys_before_a_rekey_cannot_be_had_from_the_state_after_it() -> None:
    sequence = _Sequence(SECRET, SESSION, UP, Aead.AES_256_GCM)
    sequence.take(b"")
    assert SECRET not in vars(sequence).values()
    first = sequence._next_secret
    places(sequence, RECORDS_PER_KEY)
    assert first not in vars(sequence).values()


def test_threads_never_share_a_number() -> None:
    sequence = _Sequence(SECRET, SESSION, UP, Aead.AES_256_GCM)
    taken: list[list[bytes]] = [[] for _ in range(4)]

    def take(into: list[bytes]) -> None:
        into.extend(sequence.take(b"")[2] for _ in range(3000))

    threads = [threading.Thread(target=take, args=(into,)) for into in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({data for into in taken for data in into}) == 12_000
