"""One task trained in several modes, side by side: on the terminal, as `compare.json` and `compare.html`.

Every figure is one that the run's own report has, from the same sums over its ledger.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tightbeam.common.accounts.rows import StepBytes
from tightbeam.common.files import atomic_write
from tightbeam.edge.modes.registry import MODES
from tightbeam.edge.report.billing import whose
from tightbeam.edge.report.pages import render
from tightbeam.edge.report.schema import Edge
from tightbeam.edge.report.summary import summarise
from tightbeam.edge.report.table import standard_output
from tightbeam.edge.report.units import bytes_text, count_text, flops_text, money_text, seconds_text

__all__ = ["ModeResult", "lines_of", "print_comparison", "read_result", "to_html", "write_comparison"]

_STEP_KINDS = ("forward", "backward", "evaluation", "fill")


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """What training in one mode gave and took."""

    mode: str
    model: str
    cut: str
    eval_loss_before: float | None  # nats per learned token; None without evaluation data
    eval_loss_after: float | None
    wire_up_bytes: int  # of steps; weights and tokenizer are fetched once and shared
    wire_down_bytes: int
    edge_flops: int
    cloud_flops: int
    seconds: float  # training, and waiting for the trunk in evaluations
    peak_memory_bytes: int  # of the mode's own process
    held_bytes: int | None = None  # weights at the edge, fetched once and kept; None: the ledger does not say
    cloud_bill: float = 0.0  # for steps: their traffic and the cloud's compute
    electricity: float = 0.0  # of the edge
    currency: str = "USD"
    whose: str = ""  # prices
    seen_tokens: int  # whose hidden states the cloud computed on, each pass counted
    seen_gradients: int  # steps in which a gradient crossed

    @property
    def cloud_saw(self) -> str:
        """In words."""
        if not self.seen_tokens:
            return "nothing of the data"
        seen = f"hidden states of {count_text(self.seen_tokens)} tokens, each pass counted"
        if not self.seen_gradients:
            return f"{seen}; no gradient"
        return f"{seen}; gradients at the cut in {count_text(self.seen_gradients)} steps"


def read_result(mode: str, folder: Path) -> ModeResult:
    """Sum up one mode's run folder; raises what `summarise` raises."""
    costs = summarise([folder])
    edge: Edge = costs.edges[0]  # of one folder
    steps = sum((edge.traffic.get(kind, StepBytes()) for kind in _STEP_KINDS), StepBytes())
    losses = [loss for _, loss in edge.eval_loss]
    return ModeResult(
        mode=mode,
        model=edge.model,
        cut=edge.cut,
        eval_loss_before=losses[0] if losses else None,
        eval_loss_after=losses[-1] if losses else None,
        wire_up_bytes=steps.wire_up_bytes,
        wire_down_bytes=steps.wire_down_bytes,
        edge_flops=edge.edge_flops,
        cloud_flops=sum(edge.cloud_flops.values()),
        seconds=edge.seconds.wall + edge.seconds.evaluation,
        peak_memory_bytes=edge.peak_memory_bytes,
        held_bytes=edge.model_bytes if MODES[mode].whole_model else edge.weight_bytes,
        cloud_bill=costs.total.training.money + costs.total.evaluation.money,
        electricity=costs.total.bill.edge_electricity,
        currency=costs.prices.currency,
        whose=whose(costs.bill),
        seen_tokens=edge.training_tokens + edge.evaluation_tokens + edge.fill_tokens,
        seen_gradients=edge.step_counts.get("backward", 0),
    )


def lines_of(results: Sequence[ModeResult]) -> dict[str, list[str]]:
    """The table: a label, and its value in each mode."""
    return {
        "evaluation loss before": [_loss(result.eval_loss_before) for result in results],
        "evaluation loss after": [_loss(result.eval_loss_after) for result in results],
        "up, wire": [bytes_text(result.wire_up_bytes) for result in results],
        "down, wire": [bytes_text(result.wire_down_bytes) for result in results],
        "edge operations": [flops_text(result.edge_flops) for result in results],
        "cloud operations": [flops_text(result.cloud_flops) for result in results],
        "time": [seconds_text(result.seconds) for result in results],
        "peak memory, edge": [bytes_text(result.peak_memory_bytes) for result in results],
        "cloud's bill, steps": [money_text(result.cloud_bill, result.currency) for result in results],
        "edge electricity": [money_text(result.electricity, result.currency) for result in results],
        "weights to fetch, once": [
            "-" if result.held_bytes is None else bytes_text(result.held_bytes) for result in results
        ],
    }


def _whose_prices(results: Sequence[ModeResult]) -> str:
    """Whose prices they are, by mode where they differ."""
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(result.whose, []).append(result.mode)
    return ". ".join(f"{', '.join(modes)}: {whose}" for whose, modes in found.items())


def print_comparison(results: Sequence[ModeResult], console: Console | None = None) -> None:
    """Print one column per mode, then what the cloud saw in each; to standard output by default."""
    console = console or standard_output()
    table = Table(
        title="One task in several modes", title_justify="left", title_style="bold", show_edge=False
    )
    table.add_column("")
    for result in results:
        table.add_column(result.mode, justify="right")
    for label, values in lines_of(results).items():
        table.add_row(label, *values)
    console.print(table)
    prices = f"Whose prices: {_whose_prices(results)}. Not in them: the weights, which are fetched once."
    console.print(prices, highlight=False, markup=False, soft_wrap=True)
    for result in results:
        line = f"The cloud saw, {result.mode}: {result.cloud_saw}."
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def to_html(results: Sequence[ModeResult]) -> str:
    """Render the page: self-contained, like a run's report."""
    return render("compare.html", results=results, lines=lines_of(results), whose=_whose_prices(results))


def write_comparison(results: Sequence[ModeResult], folder: Path) -> Path:
    """Write `compare.json` and `compare.html`; the page's path is returned."""
    plain = [asdict(result) | {"cloud_saw": result.cloud_saw} for result in results]
    atomic_write(folder / "compare.json", json.dumps(plain, indent=2) + "\n")
    atomic_write(folder / "compare.html", to_html(results))
    return folder / "compare.html"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
