"""From run folders to `Costs`: sums up each edge's ledger, with predictions, prices and other modes beside.

A step key counts once. A row that repeats a key (a resumed run sent it again, and the cloud did not bill it
again) adds its seconds and its `resent_bytes`, not its bytes and operations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tightbeam.common.costs.modes import TokenBytes, mode_costs, predict
from tightbeam.common.costs.prices import Prices
from tightbeam.common.costs.reading import RunRecords, read_run
from tightbeam.common.costs.rows import StepBytes, StepRow
from tightbeam.common.costs.schema import Costs, Edge, Prediction, Seconds, TimeBin, Total
from tightbeam.common.errors import DataError

__all__ = ["summarise"]

_MAX_BINS = 60
_STEP_KINDS = ("forward", "backward", "evaluation")


def summarise(run_folders: Sequence[str | Path], prices: Prices | None = None) -> Costs:
    """Sum up one or several run folders; several are the edges of one experiment.

    Raises:
        DataError: a folder is missing, is no run folder, holds no step yet, or is given twice.

    """
    prices = prices or Prices()
    if not run_folders:
        raise DataError("No run folder was given.", cure="Name at least one, such as runs/demo.")
    paths = [Path(folder).resolve() for folder in run_folders]
    if len(set(paths)) < len(paths):
        raise DataError("A run folder was given twice.", cure="Name each edge's folder once.")
    records = [read_run(folder) for folder in run_folders]
    names = _names(paths)
    grid = _Grid.over(records)
    edges = [_edge(record, name, grid) for record, name in zip(records, names, strict=True)]
    passes = {edge.name: _passes(record.config) for edge, record in zip(edges, records, strict=True)}
    total = _total(edges, prices)
    wire_ratio = total.step_wire_bytes / max(total.step_payload_bytes, 1)
    return Costs(edges=edges, total=total, modes=mode_costs(edges, passes, wire_ratio, prices), prices=prices)


def _edge(record: RunRecords, name: str, grid: "_Grid") -> Edge:
    last = record.runs[-1]
    billed, kinds = _billed(record.steps)
    by_kind = {
        kind: [row for row in billed if kinds[row.run, row.step, row.kind] == kind] for kind in _STEP_KINDS
    }
    traffic = {kind: sum((row.bytes for row in rows), StepBytes()) for kind, rows in by_kind.items()}
    for transfer in record.transfers:
        moved = StepBytes(wire_up_bytes=transfer.wire_up_bytes, wire_down_bytes=transfer.wire_down_bytes)
        traffic[transfer.kind] = traffic.get(transfer.kind, StepBytes()) + moved
    training_tokens = sum(row.tokens for row in by_kind["forward"])
    evaluation_tokens = sum(row.tokens for row in by_kind["evaluation"])
    return Edge(
        name=name,
        runs=list(dict.fromkeys(row.run for row in record.runs)),
        model=last.model,
        fingerprint=last.fingerprint,
        cut=last.cut,
        mode=last.mode,
        dtype=last.dtype,
        codecs=last.codecs(),
        hidden_size=last.hidden_size,
        device=str(record.env.get("device", "unknown")),
        platform=str(record.env.get("platform", "unknown")),
        optimizer_steps=len({row.n for row in record.optimizer_steps}),
        step_counts={kind: len(rows) for kind, rows in by_kind.items()},
        retried_steps=sum(row.attempts > 1 for row in record.steps) + len(record.steps) - len(billed),
        training_tokens=training_tokens,
        evaluation_tokens=evaluation_tokens,
        sequences=sum(row.segments for kind in ("forward", "evaluation") for row in by_kind[kind]),
        traffic=traffic,
        resent_bytes=sum(row.resent_bytes for row in record.steps),
        edge_flops=sum(row.edge_flops for row in record.optimizer_steps),
        cloud_flops={kind: sum(row.cloud_flops for row in rows) for kind, rows in by_kind.items()},
        seconds=_seconds(record, kinds),
        cloud_compute_s=sum(row.cloud_compute_s for row in record.steps),
        peak_memory_bytes=max((row.peak_memory_bytes for row in record.optimizer_steps), default=0),
        train_loss=list({row.n: (row.n, row.loss) for row in record.optimizer_steps}.values()),
        eval_loss=list({row.n: (row.n, row.loss) for row in record.evals}.values()),
        timeline=grid.timeline(record),
        prediction=_prediction(record, traffic, training_tokens, evaluation_tokens),
    )


def _billed(steps: Iterable[StepRow]) -> tuple[list[StepRow], dict[tuple[str, int, str], str]]:
    """First row of each key, and what each key was for: a forward without a backward is an evaluation."""
    first: dict[tuple[str, int, str], StepRow] = {}
    for row in steps:
        first.setdefault((row.run, row.step, row.kind), row)
    kinds = {
        (run, step, kind): kind if kind != "forward" or (run, step, "backward") in first else "evaluation"
        for run, step, kind in first
    }
    return list(first.values()), kinds


def _seconds(record: RunRecords, kinds: dict[tuple[str, int, str], str]) -> Seconds:
    training = [row for row in record.steps if kinds[row.run, row.step, row.kind] != "evaluation"]
    evaluation = [row for row in record.steps if kinds[row.run, row.step, row.kind] == "evaluation"]
    wall = sum(row.wall_s for row in record.optimizer_steps)
    phases = {
        "edge_compute": sum(row.edge_compute_s for row in record.optimizer_steps),
        "codec": sum(row.codec_s for row in training),
        "seal": sum(row.seal_s for row in training),
        "network": sum(row.network_s for row in training),
        "cloud_queue": sum(row.cloud_queue_s for row in training),
        "cloud_compute": sum(row.cloud_compute_s for row in training),
    }
    other = max(0.0, wall - sum(phases.values()))
    return Seconds(wall=wall, **phases, other=other, evaluation=sum(map(_spent, evaluation)))


def _spent(row: StepRow) -> float:
    return row.codec_s + row.seal_s + row.network_s + row.cloud_queue_s + row.cloud_compute_s


@dataclass(frozen=True)
class _Grid:
    """Slices of time that all edges of a report share, so that their bytes can be added."""

    start_s: float
    width_s: float
    num_bins: int

    @classmethod
    def over(cls, records: Sequence[RunRecords]) -> Self:
        stamps = [row.time_unix_s for record in records for row in record.runs]
        stamps += [row.time_unix_s for record in records for row in record.steps]
        # Wide enough for two forwards and two backwards of an edge: fewer would only show which came first.
        num_bins = min(max(len(record.steps) for record in records) // 4 + 1, _MAX_BINS)
        return cls(min(stamps), max((max(stamps) - min(stamps)) / num_bins, 1e-3), num_bins)

    def timeline(self, record: RunRecords) -> list[TimeBin]:
        """Wire bytes of all rows, by slice; slices without any are left out."""
        bins: dict[int, dict[str, int]] = {}
        for row in record.steps:
            index = min(int((row.time_unix_s - self.start_s) / self.width_s), self.num_bins - 1)
            sums = bins.setdefault(index, {})
            for way, moved in (("up", row.bytes.wire_up_bytes), ("down", row.bytes.wire_down_bytes)):
                key = f"{row.kind}_{way}_bytes"
                sums[key] = sums.get(key, 0) + moved
        return [
            TimeBin.model_validate({"start_s": index * self.width_s, "seconds": self.width_s, **bins[index]})
            for index in sorted(bins)
        ]


def _prediction(
    record: RunRecords, traffic: dict[str, StepBytes], training_tokens: int, evaluation_tokens: int
) -> Prediction | None:
    run = record.runs[-1]
    if run.hidden_size is None or run.mode != "ushape":
        return None
    steps = sum((traffic[kind] for kind in _STEP_KINDS), StepBytes())
    return predict(
        TokenBytes.of(run.hidden_size, run.codecs()),
        training_tokens=training_tokens,
        evaluation_tokens=evaluation_tokens,
        measured_payload_bytes=steps.payload_up_bytes + steps.payload_down_bytes,
    )


def _total(edges: list[Edge], prices: Prices) -> Total:
    moved = sum((part for edge in edges for part in edge.traffic.values()), StepBytes())
    steps = sum((edge.traffic[kind] for edge in edges for kind in _STEP_KINDS), StepBytes())
    cloud_flops = sum(sum(edge.cloud_flops.values()) for edge in edges)
    edge_s = sum(edge.seconds.wall + edge.seconds.evaluation for edge in edges)
    cloud_compute_s = sum(edge.cloud_compute_s for edge in edges)
    energy = prices.energy(edge_s=edge_s, cloud_compute_s=cloud_compute_s)
    return Total(
        training_tokens=sum(edge.training_tokens for edge in edges),
        evaluation_tokens=sum(edge.evaluation_tokens for edge in edges),
        bytes=moved,
        step_payload_bytes=steps.payload_up_bytes + steps.payload_down_bytes,
        step_wire_bytes=steps.wire_total_bytes,
        resent_bytes=sum(edge.resent_bytes for edge in edges),
        edge_flops=sum(edge.edge_flops for edge in edges),
        cloud_flops=cloud_flops,
        wall_s=max(edge.seconds.wall + edge.seconds.evaluation for edge in edges),
        edge_s=edge_s,
        cloud_compute_s=cloud_compute_s,
        energy=energy,
        bill=prices.bill(
            wire_bytes=moved.wire_total_bytes, cloud_flops=cloud_flops, edge_joules=energy.edge_joules
        ),
    )


def _passes(config: dict[str, Any]) -> float:
    """How often each example was seen; one if the recipe counts steps, the dearest case for a cache."""
    train = config.get("train")
    epochs = train.get("epochs") if isinstance(train, dict) else None
    return float(epochs) if isinstance(epochs, int | float) else 1.0


def _names(paths: list[Path]) -> list[str]:
    """Folder names, with their parents where two are equal."""
    plain = [path.name for path in paths]
    return [p.name if plain.count(p.name) == 1 else f"{p.parent.name}/{p.name}" for p in paths]
