"""From run folders to `Costs`: sums up each edge's ledger, with predictions, prices and other modes beside.

A step key counts once. A row that repeats a key (a resumed run sent it again, and the cloud did not bill it
again) adds its seconds and its `resent_bytes`, not its bytes and operations.

Steps that fill a cache are on their way while the edge computes. Only the seconds count in which the edge
stood waiting for one, split as that step's own network, queue and compute. Neither these nor coding count for
more than the wall leaves: a checkpoint, beside any optimizer step, takes in fills as well.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tightbeam.common.accounts.prices import Energy, Prices, Tariff
from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.common.errors import DataError
from tightbeam.edge.modes.registry import MODES
from tightbeam.edge.report import billing
from tightbeam.edge.report.modes import TokenBytes, mode_costs, predict
from tightbeam.edge.report.reading import RunRecords, read_run
from tightbeam.edge.report.schema import Costs, Edge, Prediction, Seconds, TimeBin, Total

__all__ = ["summarise"]

_MAX_BINS = 60
_STEP_KINDS = ("forward", "backward", "evaluation", "fill")
_KIND_OF = {"train": "forward", "evaluate": "evaluation", "fill": "fill"}
_WAITS = {
    "seal": "seal_s",
    "network": "network_s",
    "cloud_queue": "cloud_queue_s",
    "cloud_compute": "cloud_compute_s",
}


def summarise(run_folders: Sequence[str | Path], prices: Prices | None = None) -> Costs:
    """Sum up one or several run folders; several are the edges of one experiment.

    What `prices` leaves out is what the cloud asked for, or else assumed.

    Raises:
        DataError: a folder is missing, is no run folder, holds no step yet, or is given twice; or the clouds
            asked in several currencies.
        UsageError: `prices` has another currency than the cloud, and not all that it asked for.

    """
    if not run_folders:
        raise DataError("No run folder was given.", cure="Name at least one, such as runs/demo.")
    paths = [Path(folder).resolve() for folder in run_folders]
    if len(set(paths)) < len(paths):
        raise DataError("A run folder was given twice.", cure="Name each edge's folder once.")
    records = [read_run(folder) for folder in run_folders]
    names = _names(paths)
    grid = _Grid.over(records)
    edges = [_edge(record, name, grid, prices) for record, name in zip(records, names, strict=True)]
    passes = {edge.name: _passes(record.config) for edge, record in zip(edges, records, strict=True)}
    newest = max((record.runs[-1] for record in records), key=lambda start: start.time_unix_s)
    tariff = Tariff.of(newest.prices, prices)
    return Costs(
        edges=edges,
        total=_total(edges),
        modes=mode_costs(edges, passes, tariff.prices),
        bill=billing.merged(line for edge in edges for line in edge.bill),
        prices=tariff.prices,
        price_sources=dict(tariff.sources),
    )


def _edge(record: RunRecords, name: str, grid: "_Grid", table: Prices | None) -> Edge:
    last, device = record.runs[-1], str(record.env.get("device", "unknown"))
    billed, kinds = _billed(record.steps)
    evaluates = _in_evaluation(record, kinds)
    seconds = _seconds(record, evaluates)
    cloud_compute_s = sum(row.cloud_compute_s for row in record.steps)
    energy = Tariff.of(last.prices, table).prices.energy(
        edge_s=seconds.wall + seconds.evaluation,
        cloud_compute_s=cloud_compute_s,
        edge_device=device,
        cloud_device=last.cloud_device,
    )
    by_kind = {
        kind: [row for row in billed if kinds[row.run, row.step, row.kind] == kind] for kind in _STEP_KINDS
    }
    if not by_kind["fill"]:
        del by_kind["fill"]  # a mode without a cache does not show one
    traffic = {kind: sum((row.bytes for row in rows), StepBytes()) for kind, rows in by_kind.items()}
    for transfer in record.transfers:
        moved = StepBytes(wire_up_bytes=transfer.wire_up_bytes, wire_down_bytes=transfer.wire_down_bytes)
        traffic[transfer.kind] = traffic.get(transfer.kind, StepBytes()) + moved
    training_tokens = sum(row.tokens for row in by_kind["forward"])
    evaluation_tokens = sum(row.tokens for row in by_kind["evaluation"])
    fill_tokens = sum(row.tokens for row in by_kind.get("fill", ()))
    optimizer_rows = {row.n: row for row in record.optimizer_steps}
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
        device=device,
        cloud_device=last.cloud_device,
        platform=str(record.env.get("platform", "unknown")),
        weight_bytes=last.weight_bytes,
        model_bytes=last.model_bytes,
        optimizer_steps=len(optimizer_rows),
        step_counts={kind: len(rows) for kind, rows in by_kind.items()},
        retried_steps=sum(row.attempts > 1 for row in record.steps) + len(record.steps) - len(billed),
        training_tokens=training_tokens,
        evaluation_tokens=evaluation_tokens,
        fill_tokens=fill_tokens,
        trained_tokens=sum(row.tokens for row in optimizer_rows.values()),
        shared_tokens=sum(row.shared_tokens for row in billed),
        evaluated_tokens=sum(row.tokens for row in {row.n: row for row in record.evals}.values()),
        sequences=sum(row.segments for kind in by_kind if kind != "backward" for row in by_kind[kind]),
        traffic=traffic,
        resent_bytes=sum(row.resent_bytes for row in record.steps),
        disputed_bytes=sum(row.disputed_bytes for row in record.steps),
        edge_flops=sum(row.edge_flops for row in record.optimizer_steps),
        cloud_flops={kind: sum(row.cloud_flops for row in rows) for kind, rows in by_kind.items()},
        seconds=seconds,
        cloud_compute_s=cloud_compute_s,
        peak_memory_bytes=max((row.peak_memory_bytes for row in record.optimizer_steps), default=0),
        train_loss=[(n, row.loss) for n, row in optimizer_rows.items()],
        eval_loss=list({row.n: (row.n, row.loss) for row in record.evals}.values()),
        timeline=grid.timeline(record),
        prediction=_prediction(record, by_kind),
        energy=energy,
        bill=billing.lines_of(
            record, billed, lambda row: kinds[row.run, row.step, row.kind] == "evaluation", energy, table
        ),
    )


def _billed(steps: Iterable[StepRow]) -> tuple[list[StepRow], dict[tuple[str, int, str], str]]:
    """First row of each key, and what each key was for.

    Where no purpose was written, a forward without a backward is an evaluation.
    """
    first: dict[tuple[str, int, str], StepRow] = {}
    for row in steps:
        first.setdefault((row.run, row.step, row.kind), row)

    def kind_of(row: StepRow) -> str:
        if row.kind != "forward":
            return row.kind
        followed = (row.run, row.step, "backward") in first
        return _KIND_OF.get(row.purpose, "forward" if followed else "evaluation")

    return list(first.values()), {key: kind_of(row) for key, row in first.items()}


def _in_evaluation(record: RunRecords, kinds: dict[tuple[str, int, str], str]) -> Callable[[StepRow], bool]:
    """Whether an evaluation waited for a step: its own, or one that filled its cache."""
    by_evals = {id(row) for row in record.waited_by_evals}

    def evaluates(row: StepRow) -> bool:
        kind = kinds[row.run, row.step, row.kind]
        return kind == "evaluation" or (kind == "fill" and id(row) in by_evals)

    return evaluates


def _seconds(record: RunRecords, in_evaluation: Callable[[StepRow], bool]) -> Seconds:
    training = [row for row in record.steps if not in_evaluation(row)]
    wall = sum(row.wall_s for row in record.optimizer_steps)
    edge_compute = sum(row.edge_compute_s for row in record.optimizer_steps)
    codec = min(sum(row.codec_s for row in training), max(wall - edge_compute, 0.0))
    in_turn = _waits(row for row in training if row.waited_s is None)
    overlapping = _waits(row for row in training if row.waited_s is not None)
    left = wall - edge_compute - codec - sum(in_turn.values())
    fit = min(max(left, 0.0) / (sum(overlapping.values()) or 1.0), 1.0)
    waits = {phase: in_turn[phase] + fit * overlapping[phase] for phase in _WAITS}
    other = max(0.0, wall - edge_compute - codec - sum(waits.values()))
    evaluation = sum(row.blocked_s for row in record.steps if in_evaluation(row))
    return Seconds(
        wall=wall, edge_compute=edge_compute, codec=codec, **waits, other=other, evaluation=evaluation
    )


def _waits(rows: Iterable[StepRow]) -> dict[str, float]:
    """Seconds by phase in which the edge stood waiting."""
    shares = [(row, row.waited_share) for row in rows]
    return {phase: sum(share * getattr(row, name) for row, share in shares) for phase, name in _WAITS.items()}


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


def _prediction(record: RunRecords, by_kind: dict[str, list[StepRow]]) -> Prediction | None:
    run = record.runs[-1]
    spec = MODES.get(run.mode)
    if run.hidden_size is None or spec is None or (spec.has_side and run.tap_size is None):
        return None
    tokens = {kind: sum(row.tokens for row in rows) for kind, rows in by_kind.items()}
    moved = [row.bytes for rows in by_kind.values() for row in rows]
    return predict(
        TokenBytes.of(run.hidden_size, run.codecs(), num_taps=run.num_taps, tap_size=run.tap_size or 0),
        training_tokens=tokens["backward"],
        evaluation_tokens=tokens["evaluation"] + tokens["forward"] - tokens["backward"],
        fill_tokens=tokens.get("fill", 0),
        shared_tokens=sum(row.shared_tokens for rows in by_kind.values() for row in rows),
        measured_payload_bytes=sum(part.payload_up_bytes + part.payload_down_bytes for part in moved),
    )


def _total(edges: list[Edge]) -> Total:
    lines = [line for edge in edges for line in edge.bill]
    billing.require_one_currency(lines)
    moved = sum((part for edge in edges for part in edge.traffic.values()), StepBytes())
    steps = sum((edge.traffic.get(kind, StepBytes()) for edge in edges for kind in _STEP_KINDS), StepBytes())
    cloud_flops = sum(sum(edge.cloud_flops.values()) for edge in edges)
    edge_s = sum(edge.seconds.wall + edge.seconds.evaluation for edge in edges)
    cloud_compute_s = sum(edge.cloud_compute_s for edge in edges)
    energy = Energy(
        edge_joules=sum(edge.energy.edge_joules for edge in edges),
        cloud_joules=sum(edge.energy.cloud_joules for edge in edges),
    )
    return Total(
        training_tokens=sum(edge.training_tokens for edge in edges),
        evaluation_tokens=sum(edge.evaluation_tokens for edge in edges),
        fill_tokens=sum(edge.fill_tokens for edge in edges),
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
        bill=billing.bill_of(lines),
        training=billing.scope(lines, billing.TRAINING),
        evaluation=billing.scope(lines, billing.EVALUATION),
        download=billing.scope(lines, billing.DOWNLOAD),
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
