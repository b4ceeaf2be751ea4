"""What the same experiment would have cost otherwise: computed from its tokens, not measured.

The same tokens, the same rounds and clients, and one of:

    central          every text goes to the cloud once, which trains the adapter there
    whole at edge    plain federated LoRA: the whole model at every client, adapters on all blocks
    ushape           split as it was, with another codec
    top, cached      no adapter below the trunk: an example crosses once, then a cache serves it

A token's training takes 4 operations per weight (forward and input gradient of frozen weights) and its
evaluation 2; attention's products are left out.
"""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from tightbeam.common.costs.modes import TokenBytes
from tightbeam.common.costs.prices import Prices

__all__ = ["FLOWERTUNE_BUDGET_MB", "Alternative", "Job", "alternatives"]

FLOWERTUNE_BUDGET_MB = 200_000
"""FlowerTune's limit for adapters, both directions, in MB of 2**20 bytes."""
_TEXT_BYTES_PER_TOKEN = 4  # of English under usual tokenizers


class Alternative(BaseModel):
    """One way to run the experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    measured: bool
    activation_bytes: int  # or, for central, the texts
    adapter_bytes: int
    weight_bytes: int
    edge_flops: int
    cloud_flops: int
    joules: float  # at the edges
    money: float
    rule: str

    @property
    def moved_bytes(self) -> int:
        """Everything."""
        return self.activation_bytes + self.adapter_bytes + self.weight_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every alternative has to do."""

    training_tokens: int
    evaluation_tokens: int
    passes: float  # how often an example is seen
    exchanges: int  # messages with an adapter down
    train_exchanges: int  # of them, those with one up
    participants: int
    adapter_bytes_per_block: float
    mean_rank: float
    wire_ratio: float  # wire over payload bytes
    joules_per_flop: float
    hidden_size: int
    num_blocks: int
    dtype: str
    weight_bytes: int  # of the whole backbone
    measured_bytes: tuple[int, int, int]  # activations, adapters, weights
    measured_flops: tuple[int, int]  # edge, cloud

    @property
    def weights(self) -> int:
        """Elements of the whole backbone."""
        return self.weight_bytes // (4 if self.dtype == "float32" else 2)

    def payload(self, codec: str, *, gradients: bool, passes: float = 1.0) -> float:
        """Payload bytes of all steps."""
        names = ("activations_up", "activations_down", "gradients_up", "gradients_down")
        row = TokenBytes.of(self.hidden_size, dict.fromkeys(names, codec))
        per_token = row.training if gradients else row.forward
        return self.training_tokens / passes * per_token + self.evaluation_tokens * row.forward


def alternatives(job: Job, prices: Prices) -> list[Alternative]:
    """The experiment as it was, and the others."""

    def cost(
        name: str,
        moved: tuple[float, float, float],
        flops: tuple[float, float],
        rule: str,
        *,
        measured: bool = False,
    ) -> Alternative:
        joules = flops[0] * job.joules_per_flop
        bill = prices.bill(wire_bytes=round(sum(moved)), cloud_flops=round(flops[1]), edge_joules=joules)
        activations, adapters, weights = map(round, moved)
        return Alternative(
            name=name,
            measured=measured,
            activation_bytes=activations,
            adapter_bytes=adapters,
            weight_bytes=weights,
            edge_flops=round(flops[0]),
            cloud_flops=round(flops[1]),
            joules=joules,
            money=bill.total,
            rule=rule,
        )

    all_flops = job.weights * (4 * job.training_tokens + 2 * job.evaluation_tokens)
    whole_adapters = job.adapter_bytes_per_block * job.num_blocks * (job.exchanges + job.train_exchanges)
    texts = (job.training_tokens / job.passes + job.evaluation_tokens) * _TEXT_BYTES_PER_TOKEN
    _, adapters, weights = job.measured_bytes
    found = [
        cost("as it was", job.measured_bytes, job.measured_flops, "measured", measured=True),
        cost(
            "central LoRA", (texts, 0, 0), (0, all_flops), "the texts leave the edges: 4 bytes a token, once"
        ),
        cost(
            "whole model at the edge",
            (0, whole_adapters, job.weight_bytes * job.participants),
            (all_flops, 0),
            "plain federated LoRA on all blocks; the weights are fetched once by each client",
        ),
    ]
    for codec in ("fp32", "bf16", "int8"):
        payload = job.payload(codec, gradients=True) * job.wire_ratio
        rule = "4d per token of training, 2d of evaluation"
        found.append(cost(f"ushape, {codec}", (payload, adapters, weights), job.measured_flops, rule))
    payload = job.payload("bf16", gradients=False, passes=job.passes) * job.wire_ratio
    flops = (job.measured_flops[0], job.measured_flops[1] / 2 / job.passes)
    rule = "2d per token, each example once; no adapter below the trunk"
    found.append(cost("top, bf16, cached", (payload, adapters, weights), flops, rule))
    return found
