"""Rows that samples share cross once, and nothing else changes: not the activations, not the losses.

Activations are compared within rounding, not to the bit. The rows of a shared prefix are those that were
computed for the first sample that has it; a matrix product or an attention kernel may round them otherwise
for another one, whose length and place in the step differ.
"""

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.cached_runs import cached_recipe, losses, train_over
from support.in_process import Fault, InProcessCloud
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.backbone import Segments, Taps
from tightbeam.common.wire.prefixes import SharedPrefixes
from tightbeam.edge.link.connection import connect
from tightbeam.edge.link.stepper import Answer

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MODES: dict[str, dict[str, Any]] = {
    "top": {"mode": "top"},
    "side": {"mode": "side", "side": {"taps": 2, "width": 16, "heads": 2}},
}
IDS_N = torch.tensor([7, 8, 9, 1, 7, 8, 9, 2, 2, 7, 8, 5])
SEGMENTS = Segments((4, 5, 3), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]))
NUM_SHARED = 3 + 2


def hidden() -> Tensor:
    """What a causal bottom puts out for these tokens: a row follows from what is up to it."""
    table_VD = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    return torch.cat([table_VD[part].cumsum(0) for part in IDS_N.split(list(SEGMENTS.lengths))])


def fetched(cloud: InProcessCloud, run: str, *faults: Fault, **options: Any) -> tuple[Answer, list[StepRow]]:
    rows: list[StepRow] = []
    stepper = cloud.stepper(run, "2:2", on_row=rows.append, faults=deque(faults), **options)
    (projection,) = cloud.card.tap_offer.projections
    stepper.taps = Taps((2, 3), projection.size, projection.sha256)
    return stepper.collect(stepper.submit(hidden(), SEGMENTS, input_ids_N=IDS_N)), rows


@pytest.mark.parametrize("codec", ["fp32", "int4", "bf16/int8"])
def test_an_answer_is_that_of_whole_sequences(cloud: InProcessCloud, codec: str) -> None:
    name = codec.replace("/", " ")
    shared, (row,) = fetched(cloud, f"shared {name}", codec=codec)
    whole, (plain,) = fetched(cloud, f"whole {name}", codec=codec, share_prefixes=False)
    for one, other in zip((shared, *shared.taps), (whole, *whole.taps), strict=True):
        assert torch.allclose(one.hidden_ND, other.hidden_ND, atol=1e-6)
        assert len(one.payload) == len(other.payload)
    assert (row.tokens, row.shared_tokens, plain.shared_tokens) == (12, NUM_SHARED, 0)
    for way in ("up", "down"):
        part, all_ = (getattr(r.bytes, f"payload_{way}_bytes") for r in (row, plain))
        assert part * 12 == all_ * (12 - NUM_SHARED)
    assert row.cloud_flops == plain.cloud_flops


def test_rows_that_are_not_the_same_would_show(cloud: InProcessCloud) -> None:
    """Negative control: tokens that claim more in common than the rows have."""
    stepper = cloud.stepper("claims", "2:2")
    claimed_N = torch.tensor([7, 8, 9, 1, 7, 8, 9, 1, 2, 7, 8, 5])
    answers = [stepper.collect(stepper.submit(hidden(), SEGMENTS, input_ids_N=n)) for n in (IDS_N, claimed_N)]
    assert not torch.allclose(answers[0].hidden_ND, answers[1].hidden_ND, atol=1e-2)


def test_a_lost_reply_brings_the_same_and_is_billed_once(cloud: InProcessCloud) -> None:
    expected, _ = fetched(cloud, "calm")
    answer, (row,) = fetched(cloud, "shaken", Fault.UNREACHABLE, Fault.REPLY_LOST)
    assert torch.equal(answer.hidden_ND, expected.hidden_ND)
    assert row.attempts == 3
    (usage,) = cloud.ledger.usage("insecure/edge", ["shaken"])
    assert (usage.bytes, usage.tokens, usage.forward_steps) == (row.bytes, row.tokens, 1)


@pytest.mark.parametrize("offered", [True, False])
def test_a_cloud_that_does_not_say_so_gets_every_row(cloud: InProcessCloud, offered: bool) -> None:
    rows: list[dict[str, Any]] = []
    card = cloud.service._card
    card.shared_prefixes, before = offered, card.shared_prefixes
    try:
        with connect(cloud.listen(), insecure=True, on_row=rows.append) as edge:
            stepper = edge.open_steps("2:2")
            stepper.collect(stepper.submit(hidden(), SEGMENTS, input_ids_N=IDS_N))
    finally:
        card.shared_prefixes = before
    assert [row["shared_tokens"] for row in rows] == [NUM_SHARED * offered]


def test_a_forward_for_a_backward_shares_nothing(cloud: InProcessCloud) -> None:
    rows: list[StepRow] = []
    stepper = cloud.stepper("gradients", "2:2", on_row=rows.append)
    _, inputs = stepper.forward(hidden(), SEGMENTS, keep=True)
    stepper.backward(inputs, torch.ones(12, 16))
    assert [row.shared_tokens for row in rows] == [0, 0]
    assert SharedPrefixes.find(IDS_N, SEGMENTS) is not None


@pytest.mark.parametrize(
    ("mode", "codec", "cache"), [("top", "fp32", True), ("side", "int4", True), ("side", "fp32", False)]
)
def test_a_run_trains_the_same(
    cloud: InProcessCloud, tmp_path: Path, mode: str, codec: str, cache: bool
) -> None:
    found, moved = [], []
    for share in (True, False):
        recipe = cached_recipe(
            tmp_path / str(share), codec=codec, train={"epochs": 1}, cache={"enabled": cache}, **MODES[mode]
        )
        result, crossing = train_over(cloud, recipe, share_prefixes=share)
        found.append([float(loss) for loss in losses(result.folder)])
        moved.append(sum(row.bytes.wire_total_bytes for row in crossing.rows))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert moved[0] < 0.9 * moved[1]
