"""Bytes per token of every mode, from formulas alone: what a run will move and would have moved otherwise.

With d the hidden size and one codec, per token: `ushape` 4d in every training step (activations up and down,
gradients up and down) and 2d in every evaluation; `top` 2d once ever, then its cache serves every epoch;
`side` d up and d plus eight taps of d/16 down, once ever; `local` nothing. For a cached run, its optimizer
steps and evaluations say how many tokens `ushape` would have moved.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tightbeam.common.accounts.prices import Prices
from tightbeam.edge.modes.registry import MODES
from tightbeam.edge.report.schema import Edge, ModeCost, Prediction

__all__ = ["TokenBytes", "Workload", "mode_costs", "predict", "ran"]

_TENSORS = ("activations_up", "activations_down", "gradients_up", "gradients_down")


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Payload bytes of one token's row in each of the four tensors, and of its taps."""

    activations_up: float
    activations_down: float
    gradients_up: float
    gradients_down: float
    taps_down: float = 0.0

    @classmethod
    def of(
        cls, hidden_size: int, codecs: Mapping[str, str], *, num_taps: int = 0, tap_size: int = 0
    ) -> "TokenBytes":
        """Ask each codec how long rows and taps of these sizes get; `CodecError` for an unknown one."""
        from tightbeam.common.wire.codecs import codec  # needs torch, which a price table does not

        rows = {name: codec(codecs[name]).num_bytes((1, hidden_size)) for name in _TENSORS}
        down = codec(codecs["activations_down"])
        return cls(
            **rows,
            taps_down=num_taps * down.num_bytes((1, tap_size)) if num_taps else 0,
        )

    @property
    def forward(self) -> float:
        """Activations up and down, and taps."""
        return self.activations_up + self.activations_down + self.taps_down

    @property
    def training(self) -> float:
        """A forward and a backward."""
        return self.forward + self.gradients_up + self.gradients_down


def predict(
    row: TokenBytes,
    *,
    training_tokens: int,
    evaluation_tokens: int,
    measured_payload_bytes: int,
    fill_tokens: int = 0,
    shared_tokens: int = 0,
) -> Prediction:
    """Say what so many tokens move, beside what was measured; a cache's cross as an evaluation's do.

    Of these, `shared_tokens` do not cross: another sequence's rows are theirs.
    """
    crossing_once = evaluation_tokens + fill_tokens - shared_tokens
    predicted = row.training * training_tokens + row.forward * crossing_once
    return Prediction(
        bytes_per_training_token=row.training,
        bytes_per_evaluation_token=row.forward,
        predicted_payload_bytes=round(predicted),
        measured_payload_bytes=measured_payload_bytes,
    )


@dataclass(frozen=True, slots=True)
class Workload:
    """What every mode is asked to do: the tokens and operations of one edge."""

    row: TokenBytes
    training_tokens: int
    evaluation_tokens: int
    passes: float
    num_evals: int
    forward_flops: int
    evaluation_flops: int
    share_crossing: float
    """Of the tokens of steps without a gradient; 1 where the run shared no rows."""

    @property
    def every_step(self) -> float:
        """Payload bytes if every step and evaluation crossed."""
        return self.training_tokens * self.row.training + self.evaluation_tokens * self.row.forward

    @property
    def tokens_once(self) -> float:
        """Tokens of training and evaluation data, each counted once."""
        return self.training_tokens / self.passes + self.evaluation_tokens / self.num_evals

    @property
    def rows_once(self) -> float:
        """Of them, those whose rows cross."""
        return self.tokens_once * self.share_crossing

    def taps(self, num: int, share: float) -> float:
        """Payload bytes of so many taps of one token, each this share of the hidden size."""
        return self.row.activations_down * num * share

    @property
    def flops_once(self) -> float:
        """Cloud operations of one forward over all of them."""
        return self.forward_flops / self.passes + self.evaluation_flops / self.num_evals

    def flops(self, crosses: str) -> float:
        """Cloud operations where texts cross so."""
        if crosses == "never":
            return 0.0
        return self.flops_once if crosses == "once" else 2 * self.forward_flops + self.evaluation_flops


def mode_costs(edges: list[Edge], passes: Mapping[str, float], prices: Prices) -> list[ModeCost]:
    """Compare what ran with the other modes; edges that ran in different modes each with their own kind.

    `passes` says, by edge name, how often each training example was seen. Without a prediction, or where
    nothing crossed, there is nothing to compare.
    """
    by_mode: dict[str, list[Edge]] = {}
    for edge in edges:
        by_mode.setdefault(ran(edge), []).append(edge)
    return [cost for mode, group in by_mode.items() for cost in _group_costs(mode, group, passes, prices)]


def _group_costs(how: str, edges: list[Edge], passes: Mapping[str, float], prices: Prices) -> list[ModeCost]:
    if any(edge.prediction is None or edge.hidden_size is None for edge in edges):
        return []
    jobs = [_job(edge, passes[edge.name]) for edge in edges]
    measured = sum(edge.prediction.measured_payload_bytes for edge in edges if edge.prediction)
    measured_flops = sum(sum(edge.cloud_flops.values()) for edge in edges)
    if not measured:
        return []
    steps = [edge.traffic[kind] for edge in edges for kind in edge.cloud_flops if kind in edge.traffic]
    wire_ratio = sum(step.wire_total_bytes for step in steps) / measured
    names = [edge.name for edge in edges]
    kept, whole = _sum(edge.weight_bytes for edge in edges), _sum(edge.model_bytes for edge in edges)

    def cost(mode: str, payload: float, flops: float, rule: str, *, is_measured: bool = False) -> ModeCost:
        wire, spec = round(payload * wire_ratio), MODES[mode]
        return ModeCost(
            edges=names,
            mode=mode,
            measured=is_measured,
            payload_bytes=round(payload),
            cloud_flops=round(flops),
            cloud_bill=prices.bill(wire_bytes=wire, cloud_flops=round(flops), edge_joules=0).total,
            download_bytes=whole if spec.whole_model else kept,
            rule=rule,
            cloud_sees=spec.cloud_sees,
        )

    mode, _, uncached = how.partition(",")
    found = [cost(mode, measured, measured_flops, MODES[mode].rule(cached=not uncached), is_measured=True)]
    for other in MODES.values():
        if other.name != mode and other.payload is not None:
            payload = sum(map(other.payload, jobs))
            flops = sum(job.flops(other.crosses) for job in jobs)
            found.append(cost(other.name, payload, flops, other.computed_rule()))
    return found


def _sum(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)


def ran(edge: Edge) -> str:
    """How an edge ran: its mode, "freeze" for a `ushape` that froze, and whether nothing was cached."""
    spec = MODES.get(edge.mode)
    if spec is None:
        return edge.mode
    if spec.crosses == "once":
        return spec.name if edge.fill_tokens or not edge.training_tokens else f"{spec.name}, uncached"
    return spec.freezes_as if spec.freezes_as and edge.fill_tokens else spec.name


def _job(edge: Edge, passes: float) -> Workload:
    assert edge.hidden_size is not None
    training_tokens, evaluation_tokens = edge.training_tokens, edge.evaluation_tokens
    shareable = edge.fill_tokens  # steps with a gradient share nothing
    if MODES[edge.mode].crosses == "once":
        shareable += training_tokens + evaluation_tokens
    forward_flops = edge.cloud_flops.get("forward", 0)
    evaluation_flops = edge.cloud_flops.get("evaluation", 0)
    how = MODES.get(ran(edge))  # None where nothing was cached
    if how is not None and how.crosses in ("until frozen", "once"):
        # most tokens did not cross: ask the training loop how many there were
        crossed = training_tokens + evaluation_tokens + edge.fill_tokens
        per_token = (forward_flops + evaluation_flops + edge.cloud_flops.get("fill", 0)) / max(crossed, 1)
        training_tokens, evaluation_tokens = edge.trained_tokens, edge.evaluated_tokens
        forward_flops, evaluation_flops = (round(per_token * n) for n in (training_tokens, evaluation_tokens))
    return Workload(
        row=TokenBytes.of(edge.hidden_size, edge.codecs),
        training_tokens=training_tokens,
        evaluation_tokens=evaluation_tokens,
        passes=max(passes, 1.0),
        num_evals=max(len(edge.eval_loss), 1),
        forward_flops=forward_flops,
        evaluation_flops=evaluation_flops,
        share_crossing=max(1 - edge.shared_tokens / max(shareable, 1), 0.0),
    )
