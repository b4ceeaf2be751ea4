"""Where equality is to the last bit: retention modes, lost steps, and other segments' values.

In process: the real service over memory, no network.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor

from support.comparing import lora
from support.in_process import Fault, InProcessCloud
from support.tiny import TINY, ragged_batch, tiny_model
from tightbeam.common.backbone import PackedTrunk, Segments

_TINY_BUDGET_BYTES = 40_000  # the inputs of one step fit, its graph does not


def _gradients(cloud: InProcessCloud, family: str, run: str, *faults: Fault) -> dict[str, Tensor]:
    model = cloud.load_model(cloud.stepper(run, faults=deque(faults)))
    torch.manual_seed(1)
    adapted = get_peft_model(model, lora(family))
    adapted(**ragged_batch(5, 12, side="left")).loss.backward()
    return {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}


def _assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert torch.equal(gradient, other[name]), name


@pytest.mark.parametrize("family", TINY)
def test_hold_recompute_and_resend_give_the_same_bits(
    tiny_folder: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    found = {}
    for name, budget in (("hold", 1 << 28), ("recompute", _TINY_BUDGET_BYTES), ("resend", 0)):
        with InProcessCloud(tiny_folder(family), tmp_path / name, retention_bytes=budget) as cloud:
            found[name] = _gradients(cloud, family, name)
            entry = cloud.ledger.find("insecure/edge", name, 0, "backward")
        assert entry is not None
        assert entry.retention == ("hold" if name == "hold" else "recompute")
        # a cloud that kept nothing gets the inputs again, and does not bill them again
        assert entry.bytes.payload_up_bytes == entry.tokens * 32 * 4
    _assert_same_bits(found["hold"], found["recompute"])
    _assert_same_bits(found["hold"], found["resend"])


@pytest.mark.parametrize(
    "faults",
    [
        [Fault.UNREACHABLE],
        [Fault.REPLY_LOST],
        [Fault.NONE, Fault.UNREACHABLE],
        [Fault.NONE, Fault.REPLY_LOST],
        [Fault.NONE, Fault.STEP_LOST],
        [Fault.BUSY, Fault.ALTERED, Fault.REPLY_LOST, Fault.NONE, Fault.STEP_LOST, Fault.REPLY_LOST],
    ],
    ids=lambda faults: " ".join(fault.name.lower() for fault in faults),
)
def test_no_fault_changes_a_bit(tiny_cloud: Callable[[str], InProcessCloud], faults: list[Fault]) -> None:
    cloud, run = tiny_cloud("llama"), "faults " + " ".join(fault.name for fault in faults)
    _assert_same_bits(_gradients(cloud, "llama", run, *faults), _gradients(cloud, "llama", f"{run} none"))


_TRUNKS = {family: PackedTrunk(tiny_model(family)) for family in ("llama", "gemma2", "gpt2")}


@pytest.mark.parametrize("family", _TRUNKS)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    poison=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, -3e38]),
    data=st.data(),
)
def test_no_segment_feels_another(
    family: str, lengths: list[int], poison: float, data: st.DataObject
) -> None:
    """Forward and backward: whatever one sequence holds, the others keep every bit."""
    victim = data.draw(st.integers(0, len(lengths) - 1))
    segments = Segments(tuple(lengths), torch.cat([torch.arange(n) for n in lengths]))
    hidden_ND = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(0))
    start, stop = segments.bounds[victim]
    others_N = torch.ones(sum(lengths), dtype=torch.bool)
    others_N[start:stop] = False
    poisoned_ND = hidden_ND.clone()
    poisoned_ND[start:stop] = poison
    for clean, altered in zip(
        _run(family, hidden_ND, segments), _run(family, poisoned_ND, segments), strict=True
    ):
        assert torch.equal(clean[others_N], altered[others_N])
        assert clean[others_N].isfinite().all()
    assert not torch.equal(_run(family, poisoned_ND, segments)[0], _run(family, hidden_ND, segments)[0])


def _run(family: str, hidden_ND: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    leaf_ND = hidden_ND.clone().requires_grad_()
    out_ND = _TRUNKS[family].run(leaf_ND, segments, range(1, 4))
    (grad_ND,) = torch.autograd.grad(out_ND, leaf_ND, torch.ones_like(out_ND))
    return out_ND.detach(), grad_ND
