"""A reply cut into samples decodes to the very rows of the whole reply, and takes no more bytes than it."""

import pytest
import torch

from tightbeam.common.errors import CodecError
from tightbeam.common.wire.codecs import CODECS, codec
from tightbeam.edge.cache.rows import pack_entry, storage_codec, unpack_entry


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("width", [8, 33, 130])
def test_the_parts_are_the_whole(name: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    outlier_N = torch.tensor([100.0, *[1.0] * 10])
    payload = codec(name).encode((torch.randn(11, width) * outlier_N[:, None]).to(dtype))
    whole_ND = codec(name).decode(payload, (11, width), dtype)
    bounds = [(0, 1), (1, 5), (5, 11)]
    entries = [pack_entry(name, payload, whole_ND, *bound) for bound in bounds]
    rows = [
        unpack_entry(name, entry, stop - start, width)
        for entry, (start, stop) in zip(entries, bounds, strict=True)
    ]
    assert torch.equal(torch.cat(rows), whole_ND)
    assert rows[0].dtype == dtype
    assert not torch.equal(torch.cat(rows[::-1]), whole_ND)
    stored = storage_codec(name, dtype, width)
    assert sum(map(len, entries)) == codec(stored).num_bytes((11, width)) + 3
    if stored == name:
        assert sum(map(len, entries)) == payload.numel() + 3


@pytest.mark.parametrize("entry", [b"", bytes(7), bytes([9, 1, 2, 3, 4, 5])])
def test_an_entry_that_does_not_fit_is_refused(entry: bytes) -> None:
    with pytest.raises(CodecError):
        unpack_entry("int8", entry, 1, 4)


@pytest.mark.parametrize(
    ("wire", "dtype", "stored"),
    [
        ("fp32", torch.float32, "fp32"),
        ("bf16", torch.float32, "bf16"),
        ("int8", torch.float32, "int8"),
        ("fp32", torch.bfloat16, "bf16"),
        ("int8", torch.bfloat16, "int8"),
    ],
)
def test_the_smaller_form_is_stored(wire: str, dtype: torch.dtype, stored: str) -> None:
    assert storage_codec(wire, dtype, 64) == stored
