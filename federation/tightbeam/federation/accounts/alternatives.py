"""What the same experiment would have cost otherwise: computed from its tokens, not measured.

The same tokens, the same rounds and clients, and one of:

    central          every text goes to the cloud once, which trains the adapter there
    whole at edge    plain federated LoRA: the whole model at every client, adapters on all blocks
    ushape           split as it was, with another codec
    top, cached      no adapter below the trunk: an example crosses once, then a cache serves it

Where operations were not counted, a token's training takes 4 per weight (forward and input gradient of frozen
weights) and its evaluation 2; attention's products are left out.
"""

from pydantic import BaseModel, ConfigDict

from tightbeam.common.accounts.prices import Prices
from tightbeam.federation.accounts.workload import ExperimentWorkload

__all__ = ["FLOWERTUNE_BUDGET_MB", "Alternative", "alternatives"]

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


def alternatives(workload: ExperimentWorkload, prices: Prices) -> list[Alternative]:
    """The experiment as it was, and the others."""

    def cost(
        name: str,
        moved: tuple[float, float, float],
        flops: tuple[float, float],
        rule: str,
        *,
        measured: bool = False,
    ) -> Alternative:
        joules = flops[0] * workload.joules_per_flop
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

    all_flops = workload.weights * (4 * workload.training_tokens + 2 * workload.evaluation_tokens)
    whole_adapters = (
        workload.adapter_bytes_per_block
        * workload.num_blocks
        * (workload.exchanges + workload.train_exchanges)
    )
    weights = workload.measured_bytes[2]
    found = [
        cost("as it was", workload.measured_bytes, workload.measured_flops, "measured", measured=True),
        cost(
            "central LoRA",
            (workload.tokens_once * _TEXT_BYTES_PER_TOKEN, 0, 0),
            (0, all_flops),
            "the texts leave the edges: 4 bytes a token, once",
        ),
        cost(
            "whole model at the edge",
            (0, whole_adapters, workload.weight_bytes * workload.participants),
            (all_flops, 0),
            "plain federated LoRA on all blocks; the weights are fetched once by each client",
        ),
    ]
    for codec in ("fp32", "bf16", "int8"):
        moved = workload.wire_bytes(codec, *workload.every_step), workload.adapter_bytes["ushape"], weights
        rule = "4d per token of training, 2d of evaluation"
        found.append(cost(f"ushape, {codec}", moved, workload.ushape_flops, rule))
    moved = workload.wire_bytes("bf16", workload.tokens_once), workload.adapter_bytes["top"], weights
    flops = workload.ushape_flops[0], workload.once_cloud_flops
    rule = "2d per token, each example once; no adapter below the trunk; edge work at most as in ushape"
    found.append(cost("top, bf16, cached", moved, flops, rule))
    return found
