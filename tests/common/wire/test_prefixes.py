"""Shared prefixes: the map leaves out exactly what sequences have in common, and a hostile one is refused."""

import random

import pytest
import torch
from torch import Tensor

from tightbeam.common.backbone import Segments
from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.codecs import CODECS, codec
from tightbeam.common.wire.prefixes import RowMap, SharedPrefixes
from tightbeam.common.wire.stepping import content_sha256
from tightbeam.proto.backbone_pb2 import BACKWARD, FORWARD, StepRequest


def packed(*sequences: list[int]) -> tuple[Tensor, Segments]:
    """Token ids and segments of sequences whose positions count from 0."""
    lengths = tuple(map(len, sequences))
    positions_N = torch.cat([torch.arange(n) for n in lengths])
    return torch.tensor([token for sequence in sequences for token in sequence]), Segments(
        lengths, positions_N
    )


def found(*sequences: list[int]) -> SharedPrefixes:
    prefixes = SharedPrefixes.find(*packed(*sequences))
    assert prefixes is not None
    return prefixes


def drawn(seed: int) -> list[list[int]]:
    """Sequences over few tokens, so that prefixes of all kinds occur."""
    random_ = random.Random(seed)
    return [random_.choices(range(2), k=random_.randint(1, 9)) for _ in range(random_.randint(1, 12))]


def test_the_longest_prefix_among_earlier_sequences() -> None:
    prefixes = found([7, 8, 9], [7, 8, 1, 2], [7, 8, 1, 3, 4], [5], [7, 8, 9])
    assert prefixes.of == (0, 0, 1, 0, 0)
    assert prefixes.rows == (0, 2, 3, 0, 3)
    assert prefixes.num_rows == 3 + 2 + 2 + 1
    row_map = prefixes.row_map(
        packed([7, 8, 9], [7, 8, 1, 2], [7, 8, 1, 3, 4], [5], [7, 8, 9])[1].positions_N
    )
    assert row_map.crossing_M.tolist() == [0, 1, 2, 5, 6, 10, 11, 12]
    assert row_map.source_N.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 3, 5, 6, 7, 0, 1, 2]
    assert row_map.num_shared == 8


def test_sequences_with_nothing_in_common() -> None:
    assert SharedPrefixes.find(*packed([1, 2], [2, 2], [3])) is None


def test_equal_tokens_at_other_positions_are_not_shared() -> None:
    ids_N, segments = packed([1, 2, 3], [1, 2, 4])
    shifted_N = segments.positions_N.clone()
    shifted_N[3:] += 1
    assert SharedPrefixes.find(ids_N, Segments(segments.lengths, shifted_N)) is None
    shifted_N[3] = 0  # the first row alone stands where its like does
    partly = SharedPrefixes.find(ids_N, Segments(segments.lengths, shifted_N))
    assert partly is not None
    assert partly.rows == (0, 1)


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_found_again_and_none_crosses_twice(seed: int) -> None:
    sequences = drawn(seed)
    ids_N, segments = packed(*sequences)
    prefixes = SharedPrefixes.find(ids_N, segments)
    distinct = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    if prefixes is None:
        assert len(distinct) == len(ids_N)
        return
    row_map = prefixes.row_map(segments.positions_N)
    # a row that a causal model would give: a number for each prefix
    names = {prefix: number for number, prefix in enumerate(sorted(distinct))}
    rows_ND = torch.tensor([[float(names[tuple(s[: n + 1])])] for s in sequences for n in range(len(s))])
    assert len(row_map.pick(rows_ND)) == len(distinct) == prefixes.num_rows
    assert torch.equal(row_map.spread(row_map.pick(rows_ND)), rows_ND)
    header = StepRequest(kind=FORWARD, lengths=segments.lengths)
    prefixes.write(header)
    assert SharedPrefixes.read(StepRequest.FromString(header.SerializeToString())) == prefixes


@pytest.mark.parametrize("name", CODECS)
def test_a_payload_is_spread_as_its_rows_are(name: str) -> None:
    prefixes = found([1, 2, 3], [1, 2, 4, 5], [1, 9])
    row_map = prefixes.row_map(torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1]))
    rows_MD = torch.randn(prefixes.num_rows, 48, generator=torch.Generator().manual_seed(0))
    payload = codec(name).encode(rows_MD)
    decoded_MD = codec(name).decode(payload, tuple(rows_MD.shape), torch.float32)
    spread = row_map.spread_payload(name, payload, 48)
    decoded_ND = codec(name).decode(spread, (9, 48), torch.float32)
    assert torch.equal(decoded_ND, row_map.spread(decoded_MD))
    assert not torch.equal(decoded_ND[2], decoded_ND[5])


def request(of: list[int], rows: list[int], **changes: object) -> StepRequest:
    header = StepRequest(kind=FORWARD, lengths=[3, 4, 2], prefix_of=of, prefix_rows=rows)
    header.MergeFrom(StepRequest(**changes))  # type: ignore[arg-type]  # fields by name
    return header


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (request([0, 1, 0], [0, 1, 0]), "not before it"),
        (request([0, 2, 0], [0, 1, 0]), "not before it"),
        (request([0, 1 << 31, 0], [0, 0, 0]), "not before it"),
        (request([0, 0, 0], [1, 0, 0]), "more rows than there are"),
        (request([0, 0, 0], [0, 4, 0]), "more rows than there are"),
        (request([0, 0, 1], [0, 0, 3]), "more rows than there are"),
        (request([0, 0, 0], [0, 1 << 31, 0]), "more rows than there are"),
        (request([0, 0], [0, 1]), "of each sequence"),
        (request([0, 0, 0, 0], [0, 1, 0, 0]), "of each sequence"),
        (request([], [0, 1, 0]), "of each sequence"),
        (request([0, 0, 0], []), "of each sequence"),
        (request([0, 0, 0], [0, 1, 0], keep=True), "no backward will follow"),
        (request([0, 0, 0], [0, 1, 0], kind=BACKWARD), "no backward will follow"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(header: StepRequest, words: str) -> None:
    assert SharedPrefixes.read(request([0, 0, 1], [0, 3, 2])) is not None
    with pytest.raises(ProtocolError, match=words):
        SharedPrefixes.read(header)


def test_shared_rows_at_other_positions_are_refused() -> None:
    prefixes = SharedPrefixes((3, 3), (0, 0), (0, 2))
    assert isinstance(prefixes.row_map(torch.tensor([4, 5, 6, 4, 5, 9])), RowMap)
    with pytest.raises(ProtocolError, match="other positions"):
        prefixes.row_map(torch.tensor([4, 5, 6, 4, 6, 7]))


def test_a_request_without_a_map() -> None:
    assert SharedPrefixes.read(StepRequest(kind=FORWARD, keep=True, lengths=[3])) is None


def test_another_map_is_another_content() -> None:
    contents = {
        content_sha256(header, "1:1", [b"digest"])
        for header in (request([], []), request([0, 0, 0], [0, 1, 1]), request([0, 0, 1], [0, 1, 1]))
    }
    assert len(contents) == 3
