"""Training under a delta codec, against a whole model that codes at its two cuts, and against no codec.

Over in-process channels, float32: LoRA on the blocks that stay, three epochs over the same four batches.
"""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from support.comparing import lora
from support.in_process import InProcessCloud
from support.tiny import ragged_batch, tiny_model
from tightbeam.common.backbone import dissect
from tightbeam.common.wire.delta import BaseStore, Samples, encode_delta

Clouds = Callable[[str], InProcessCloud]
EPOCHS, BATCHES, SIZE = 3, 4, 32
BATCH = [ragged_batch(3, 10, side="right", seed=number) for number in range(BATCHES)]


class Cut(nn.Module):
    """A cut of the reference: real tokens are replaced by what the other end would decode."""

    def __init__(self) -> None:
        super().__init__()
        self.store = BaseStore()
        self.mask_BT, self.number = torch.ones(1, 1), 0

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Straight through for gradients."""
        keep_BT = self.mask_BT.bool()
        lengths = keep_BT.sum(1).tolist()
        samples = Samples.of([bytes([self.number, row]) for row in range(len(lengths))], lengths, SIZE)
        _, decoded_ND = encode_delta("int4", hidden_BTD[keep_BT], self.store.latest(samples), lengths)
        self.store.remember(samples, decoded_ND)
        moved_BTD = torch.zeros_like(hidden_BTD)
        moved_BTD[keep_BT] = decoded_ND.float() - hidden_BTD[keep_BT].detach()
        return hidden_BTD + moved_BTD


def train(model: PreTrainedModel, before: Callable[[int], None] = lambda number: None) -> dict[str, Tensor]:
    """The adapter after three epochs."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, lora("llama"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(EPOCHS):
        for number, batch in enumerate(BATCH):
            before(number)
            optimizer.zero_grad()
            adapted(**batch, use_cache=False).loss.backward()
            optimizer.step()
    return {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}


def split(cloud: InProcessCloud, codec: str) -> dict[str, Tensor]:
    stepper = cloud.stepper(str(uuid4()), codec=codec)
    try:
        return train(cloud.load_model(stepper))
    finally:
        stepper.close()  # the cloud is shared, and one tenant may have 32 streams


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def exact(tiny_cloud: Clouds) -> dict[str, Tensor]:
    return split(tiny_cloud("llama"), "fp32")


def test_split_training_is_the_whole_model_with_delta_coded_cuts(tiny_cloud: Clouds) -> None:
    model, cuts = tiny_model("llama"), (Cut(), Cut())
    blocks: Any = dissect(model).blocks
    for index, cut in ((1, cuts[0]), (4, cuts[1])):
        blocks[index].register_forward_pre_hook(lambda _, args, cut=cut: (cut(args[0]), *args[1:]))

    def before(number: int) -> None:
        for cut in cuts:
            cut.number, cut.mask_BT = number, BATCH[number]["attention_mask"]

    reference = train(model, before)
    found = split(tiny_cloud("llama"), "delta-int4/fp32")
    assert distance(found, reference) < 1e-6
    assert distance(found, split(tiny_cloud("llama"), "int4/fp32")) > 1e-4  # it would notice


def test_it_drifts_less_from_exact_training_than_the_codec_alone(
    tiny_cloud: Clouds, exact: dict[str, Tensor]
) -> None:
    plain, delta = (
        distance(split(tiny_cloud("llama"), f"{name}/fp32"), exact) for name in ("int4", "delta-int4")
    )
    assert 0 < delta < 0.7 * plain
