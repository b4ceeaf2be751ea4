"""A reply cut into samples decodes to the very rows of the whole reply, and takes no more bytes than it."""

import pytest
import torch

from tightbeam.common.errors import CodecError
from tightbeam.common.wire.codecs import CODECS, codec
from tightbeam.edge.cache.rows import cut_rows, decode_rows, storage_codec


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("width", [8, 33])
def test_the_parts_are_the_whole(name: str, width: int) -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(11, width) * torch.tensor([100.0, *[1.0] * 10])[:, None]
    payload = codec(name).encode(hidden_ND)
    whole_ND = codec(name).decode(payload, (11, width), torch.float32)
    bounds = [(0, 1), (1, 5), (5, 11)]
    parts = [cut_rows(name, payload, (11, width), *bound) for bound in bounds]
    assert sum(part.numel() for part in parts) == payload.numel()
    rows = [
        decode_rows(name, part.numpy().tobytes(), stop - start, width, torch.float32)
        for part, (start, stop) in zip(parts, bounds, strict=True)
    ]
    assert torch.equal(torch.cat(rows), whole_ND)
    assert not torch.equal(torch.cat(rows[::-1]), whole_ND)


def test_a_payload_of_another_length_is_refused() -> None:
    with pytest.raises(CodecError):
        decode_rows("int8", bytes(7), 1, 4, torch.float32)


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


def test_every_codec_can_be_stored() -> None:
    for name in CODECS:
        assert storage_codec(name, torch.float32, 64) in ("fp32", "bf16", "int8")
