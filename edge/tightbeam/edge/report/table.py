"""The same figures on a terminal."""

from rich.console import Console
from rich.table import Table

from tightbeam.common.accounts.rows import StepBytes
from tightbeam.edge.report.billing import whose
from tightbeam.edge.report.report import jobs_of, watts_of
from tightbeam.edge.report.schema import Costs, Edge
from tightbeam.edge.report.units import (
    bytes_text,
    count_text,
    flops_text,
    joules_text,
    money_text,
    seconds_text,
)

__all__ = ["print_table", "standard_output", "sum_lines"]

_UNBROKEN = 10_000  # columns


def standard_output() -> Console:
    """Standard output; where that is no terminal, lines are as long as they need to be."""
    console = Console()
    return console if console.is_terminal else Console(width=_UNBROKEN)


def print_table(costs: Costs, console: Console | None = None) -> None:
    """Print one column per edge, then totals, price and energy, to standard output unless told otherwise."""
    console = console or standard_output()
    table = Table(title="What this run cost", title_justify="left", title_style="bold", show_edge=False)
    table.add_column("")
    for edge in costs.edges:
        table.add_column(edge.name, justify="right")
    columns = [_column(edge) for edge in costs.edges]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    console.print(table)
    for line in sum_lines(costs):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _column(edge: Edge) -> dict[str, str]:
    seconds, prediction = edge.seconds, edge.prediction
    steps = [
        edge.traffic[kind] for kind in ("forward", "backward", "evaluation", "fill") if kind in edge.traffic
    ]
    up, down = sum(s.wire_up_bytes for s in steps), sum(s.wire_down_bytes for s in steps)
    weights = edge.traffic.get("weights", StepBytes())
    losses = [loss for _, loss in edge.eval_loss]
    return {
        "evaluation loss": f"{losses[0]:.3f} \u2192 {losses[-1]:.3f}" if losses else "-",
        "training tokens": count_text(edge.trained_tokens),
        "tokens crossed": count_text(edge.crossed_tokens),
        "steps up, wire": bytes_text(up),
        "steps down, wire": bytes_text(down),
        "payload by formula": bytes_text(prediction.predicted_payload_bytes) if prediction else "-",
        "payload measured": bytes_text(sum(s.payload_up_bytes + s.payload_down_bytes for s in steps)),
        "weights down, wire": bytes_text(weights.wire_down_bytes),
        "sent again": bytes_text(edge.resent_bytes),
        "training time": seconds_text(seconds.wall),
        "  edge compute": seconds_text(seconds.edge_compute),
        "  codec and seal": seconds_text(seconds.codec + seconds.seal),
        "  network": seconds_text(seconds.network),
        "  cloud queue": seconds_text(seconds.cloud_queue),
        "  cloud compute": seconds_text(seconds.cloud_compute),
        "edge operations": flops_text(edge.edge_flops),
        "cloud operations": flops_text(sum(edge.cloud_flops.values())),
        "peak memory": bytes_text(edge.peak_memory_bytes),
    }


def sum_lines(costs: Costs) -> list[str]:
    """Price, energy, and other modes of the job, a line each."""
    total, currency = costs.total, costs.prices.currency
    parts = {
        "training": total.training.money,
        "evaluation": total.evaluation.money,
        "weights, fetched once": total.download.money,
        "edge electricity": total.bill.edge_electricity,
    }
    lines = [
        f"Price: {money_text(total.bill.total, currency)} "
        f"({', '.join(f'{part} {money_text(money, currency)}' for part, money in parts.items())}). "
        f"Whose prices: {whose(costs.bill)}.",
        f"Energy, estimated: edge {joules_text(total.energy.edge_joules)}, "
        f"cloud {joules_text(total.energy.cloud_joules)} ({watts_of(costs)}).",
    ]
    lines += [
        f"In dispute: the cloud's receipts for {edge.name} name {bytes_text(edge.disputed_bytes)} for steps "
        "that moved other bytes by the edge's own count, which is the one above."
        for edge in costs.edges
        if edge.disputed_bytes
    ]
    jobs = jobs_of(costs)
    for job in jobs:
        whom = f" ({', '.join(job[0].edges)})" if len(jobs) > 1 else ""
        texts = (f"{mode.mode} {bytes_text(mode.payload_bytes)}" for mode in job if not mode.measured)
        lines.append(f"Payload in other modes{whom}, computed, not measured: {', '.join(texts)}.")
    return lines
