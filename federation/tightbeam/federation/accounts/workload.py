"""What an experiment had to do, whichever way it is done: tokens, messages and operations, from its rows.

A client of mode `top` or `side`, or with a frozen bottom, computes less than it would have in `ushape`: what
its cache holds does not cross again. What `ushape` would have taken is estimated for it from the weights: 4
operations per weight and token of training (forward and input gradient), 2 of evaluation.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightbeam.edge.modes.registry import MODES
from tightbeam.edge.report.modes import TokenBytes
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.journal import Row

__all__ = ["ExperimentWorkload", "workload_of"]

_TENSORS = ("activations_up", "activations_down", "gradients_up", "gradients_down")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentWorkload:
    """What every alternative has to do."""

    training_tokens: int
    evaluation_tokens: int
    tokens_once: float  # of training and evaluation, each client's examples counted once
    exchanges: int  # messages with an adapter down
    train_exchanges: int  # of them, those with one up
    participants: int
    adapter_bytes: Mapping[
        str, int
    ]  # both directions, ladders left out: had all trained in `ushape`, or `top`
    adapter_bytes_per_block: float  # one way
    wire_ratio: float  # wire over payload bytes
    joules_per_flop: float
    hidden_size: int
    num_blocks: int
    dtype: str
    weight_bytes: int  # of the whole backbone
    measured_bytes: tuple[int, int, int]  # activations, adapters, weights
    measured_flops: tuple[int, int]  # edge, cloud
    ushape_flops: tuple[float, float]  # edge, cloud: had every step crossed both ways
    once_cloud_flops: float  # one forward of the trunk over `tokens_once`

    @property
    def weights(self) -> int:
        """Elements of the whole backbone."""
        return self.weight_bytes // _element_bytes(self.dtype)

    @property
    def every_step(self) -> tuple[int, int]:
        """Tokens that cross forward, and of them those whose gradients cross back."""
        return self.training_tokens + self.evaluation_tokens, self.training_tokens

    def wire_bytes(self, codec: str, forward: float, backward: float = 0.0) -> float:
        """Of so many tokens' activations, and so many tokens' gradients."""
        row = TokenBytes.of(self.hidden_size, dict.fromkeys(_TENSORS, codec))
        payload = forward * row.forward + backward * (row.training - row.forward)
        return payload * self.wire_ratio


def workload_of(scenario: Scenario, backbone: Mapping[str, Any], work: Sequence[Row]) -> ExperimentWorkload:
    """Sum up an experiment's rows of clients."""
    trained = [row for row in work if row["row"] == "client_round"]
    options = {profile.name: profile.options for profile in scenario.profiles()}
    blocks = sum(options[row["client"]].shared_blocks for row in trained)
    payload = _sum(work, "payload_up_bytes", "payload_down_bytes")
    activations = _sum(work, "wire_up_bytes", "wire_down_bytes")
    adapters = _sum(work, "adapter_up_bytes", "adapter_down_bytes")
    edge_flops, joules = _sum(work, "edge_flops"), _sum(work, "joules")
    lora = _sum(trained, "adapter_down_bytes") - _sum(trained, "ladder_down_bytes", "fold_down_bytes")
    held = {row["client"]: row["weight_bytes"] for row in work if row.get("weight_bytes")}
    once = _once(scenario, work)
    return ExperimentWorkload(
        training_tokens=_sum(trained, "tokens"),
        evaluation_tokens=_sum(work, "tokens") - _sum(trained, "tokens"),
        tokens_once=sum(once.values()),
        exchanges=len(work),
        train_exchanges=len(trained),
        participants=len({row["client"] for row in work}),
        adapter_bytes={mode: round(_adapters(scenario, work, mode)) for mode in ("ushape", "top")},
        adapter_bytes_per_block=lora / max(blocks, 1),
        wire_ratio=activations / payload if payload else 1.0,
        joules_per_flop=joules / edge_flops if edge_flops else 0.0,
        hidden_size=backbone["hidden_size"],
        num_blocks=backbone["num_blocks"],
        dtype=backbone["dtype"],
        weight_bytes=backbone["weight_bytes"],
        measured_bytes=(activations, adapters, _sum(work, "weight_bytes")),
        measured_flops=(edge_flops, _sum(work, "cloud_flops")),
        ushape_flops=_ushape_flops(scenario, backbone, work, held),
        once_cloud_flops=sum(2 * n * _trunk_weights(backbone, held.get(name)) for name, n in once.items()),
    )


def _element_bytes(dtype: str) -> int:
    """Of one weight as the cloud serves it."""
    return 4 if dtype == "float32" else 2


def _sum(rows: Iterable[Row], *names: str) -> Any:
    return sum(row.get(name, 0) for row in rows for name in names)


def _trunk_weights(backbone: Mapping[str, Any], held_bytes: int | None) -> int:
    """Elements that a client which holds so much does not hold; none for one that never fetched any."""
    kept = backbone["weight_bytes"] if held_bytes is None else held_bytes
    return int(backbone["weight_bytes"] - kept) // _element_bytes(backbone["dtype"])


def _adapters(scenario: Scenario, work: Sequence[Row], mode: str) -> float:
    """Bytes of adapters, both ways, had every client shared those of its blocks that `mode` trains."""
    options, freeze = (
        {profile.name: profile.options for profile in scenario.profiles()},
        scenario.train.freeze_bottom_after,
    )
    found = 0.0
    for row in work:
        own = options[row["client"]]
        wanted, down = own.blocks_shared_in(mode), row.get("adapter_down_bytes", 0)
        # a ladder is the same share of what comes up as of what goes down
        lora = 1 - row.get("ladder_down_bytes", 0) / max(down, 1)
        trained = own.shared_blocks
        if freeze is not None and row["round"] > freeze:
            trained = min(trained, own.blocks_shared_in("top"))
        for moved, held in ((down, own.shared_blocks), (row.get("adapter_up_bytes", 0), trained)):
            found += moved * lora * wanted / max(held, 1)
    return found


def _ushape_flops(
    scenario: Scenario, backbone: Mapping[str, Any], work: Sequence[Row], held: Mapping[str, int]
) -> tuple[float, float]:
    """Counted where every step crossed both ways, else from the weights."""
    modes = {profile.name: profile.options.mode for profile in scenario.profiles()}
    freeze, edge, cloud = scenario.train.freeze_bottom_after, 0.0, 0.0
    for row in work:
        trains = row["row"] == "client_round"
        frozen = freeze is not None and row["round"] - trains >= freeze
        if MODES[modes[row["client"]]].gradients_cross and not frozen:
            edge, cloud = edge + row.get("edge_flops", 0), cloud + row.get("cloud_flops", 0)
            continue
        per_weight = (4 if trains else 2) * row.get("tokens", 0)
        edge += per_weight * (held.get(row["client"], 0) // _element_bytes(backbone["dtype"]))
        cloud += per_weight * _trunk_weights(backbone, held.get(row["client"]))
    return edge, cloud


def _once(scenario: Scenario, work: Sequence[Row]) -> dict[str, float]:
    """Tokens of each client's examples, counted once: those worked on, by how often an example was seen."""
    found: dict[str, float] = {}
    for kind in ("client_round", "client_eval"):
        tokens: dict[str, int] = {}
        passes: dict[str, float] = {}
        for row in work:
            if row["row"] == kind and "steps" in row:
                name = row["client"]
                tokens[name] = tokens.get(name, 0) + row["tokens"]
                passes[name] = passes.get(name, 0.0) + _share(scenario, row)
        for name, count in tokens.items():
            found[name] = found.get(name, 0.0) + count / max(passes[name], 1.0)
    return found


def _share(scenario: Scenario, row: Row) -> float:
    """Of a client's examples, what it saw in one message; a secure round does not say how many it has."""
    if row["row"] == "client_eval":
        return 1.0
    examples = row.get("examples")
    return row["steps"] * scenario.train.batch_size / examples if examples else 0.0
