"""Keys and digests in a header: what is written is read, and what contradicts itself is refused."""

from collections.abc import Callable

import pytest
import torch

from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.delta import Base, Bases, Samples
from tightbeam.common.wire.delta_header import BASE, DeltaHeader, key_bytes
from tightbeam.proto.backbone_pb2 import BACKWARD, FORWARD, StepRequest, TensorSpec

SIZE = 8
KEY, OTHER = b"k" * 16, b"o" * 16
HELD = Base.of(torch.ones(2, SIZE))


def request(up: Bases | None = (HELD, None), down: Bases | None = (HELD, None)) -> StepRequest:
    header = StepRequest(kind=FORWARD, keep=True, lengths=[2, 3])
    DeltaHeader.write(header, Samples.of([KEY, OTHER], [2, 3], SIZE), up, down)
    return header


def _bring(header: StepRequest, codec: str = "bf16") -> None:
    header.tensors.append(TensorSpec(name=BASE, codec=codec, shape=[5, SIZE], dtype="bfloat16"))


def test_what_is_written_is_read() -> None:
    found = DeltaHeader.read(request(), SIZE)
    assert found == DeltaHeader(Samples((KEY, OTHER), (2, 3), SIZE), (HELD.check, b""), (HELD.check, b""))
    alone = DeltaHeader.read(request(down=None), SIZE)
    assert alone is not None
    assert (alone.up, alone.down) == ((HELD.check, b""), None)


def test_a_repeated_sample_has_no_key() -> None:
    header = StepRequest(kind=FORWARD, keep=True, lengths=[2, 2])
    DeltaHeader.write(header, Samples.of([KEY, KEY], [2, 2], SIZE), (None, None), None)
    found = DeltaHeader.read(header, SIZE)
    assert found is not None
    assert found.samples.keys == (KEY, b"")


def test_its_bytes_are_known_before() -> None:
    assert key_bytes(request()) == key_bytes(request(up=(None, None))) == 2 * (16 + 8 + 8)
    assert key_bytes(request(down=None)) == 2 * (16 + 8)
    assert key_bytes(StepRequest()) == 0


def test_a_plain_request_has_none() -> None:
    assert DeltaHeader.read(StepRequest(kind=FORWARD, keep=True, lengths=[2]), SIZE) is None


def _set(**fields: object) -> Callable[[StepRequest], None]:
    def change(header: StepRequest) -> None:
        for name, value in fields.items():
            setattr(header, name, value)

    return change


def _bring_coded(header: StepRequest) -> None:
    _bring(header, "int4")


def _bring_unasked(header: StepRequest) -> None:
    header.bases_down = b""
    _bring(header)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set(sample_keys=KEY), "do not fit 2 segments"),
        (_set(sample_keys=b""), "do not fit 2 segments"),
        (_set(sample_keys=KEY + OTHER + KEY), "do not fit 2 segments"),
        (_set(bases_up=b"1234567"), "do not fit 2 segments"),
        (_set(bases_down=b"1" * 24), "do not fit 2 segments"),
        (_set(sample_keys=KEY + KEY), "names a sample twice"),
        (_set(sample_keys=bytes(16) + KEY), "of a sample that it does not name"),
        (_set(bases_up=b"", bases_down=b""), "codes neither direction"),
        (_set(keep=False), "Only a forward"),
        (_set(kind=BACKWARD), "Only a forward"),
        (_bring_coded, "in bf16"),
        (_bring_unasked, "for the reply only"),
    ],
)
def test_contradictions_are_refused(change: Callable[[StepRequest], None], words: str) -> None:
    header = request()
    change(header)
    with pytest.raises(ProtocolError, match=words):
        DeltaHeader.read(header, SIZE)


def test_bases_without_names_are_refused() -> None:
    header = StepRequest(kind=FORWARD, keep=True, lengths=[2, 3])
    _bring(header)
    with pytest.raises(ProtocolError, match="names none"):
        DeltaHeader.read(header, SIZE)
