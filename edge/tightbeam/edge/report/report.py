"""Writes what runs cost: `costs.json`, `costs.csv` and one self-contained `report.html`; prints a table.

The page needs no network and no script: its pictures are inline SVG, its colours follow the reader's light or
dark preference, and it prints. Every text from a ledger is escaped.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tightbeam.common.accounts.prices import ASSUMED, Prices
from tightbeam.common.files import atomic_write
from tightbeam.edge.report.billing import whose
from tightbeam.edge.report.modes import ran
from tightbeam.edge.report.pages import render
from tightbeam.edge.report.schema import Costs, Edge, ModeCost
from tightbeam.edge.report.summary import summarise

__all__ = ["PARTS", "PHASES", "jobs_of", "to_csv", "to_html", "watts_of", "write_files", "write_report"]

PHASES = {
    "edge_compute": "edge compute",
    "codec": "codec",
    "seal": "seal",
    "network": "network",
    "cloud_queue": "cloud queue",
    "cloud_compute": "cloud compute",
    "other": "other",
}
"""Fields of `Seconds` that add up to its `wall`, and their names for people."""
PARTS = {
    ("training", "bytes"): "training steps, traffic",
    ("training", "flops"): "training steps, cloud compute",
    ("evaluation", "bytes"): "evaluation steps, traffic",
    ("evaluation", "flops"): "evaluation steps, cloud compute",
    ("download", "bytes"): "weights, fetched once",
    ("electricity", "joules"): "edge electricity",
}
"""Names for people of the lines of a bill, by part and unit."""


def write_report(run_folders: Sequence[str | Path], output: str | Path, prices: Prices | None = None) -> Path:
    """Sum up run folders and write the three files into `output`; the page's path is returned.

    Raises:
        DataError: see `summarise`.
        TightbeamError: `output` cannot be written.

    """
    return write_files(summarise(run_folders, prices), output)


def write_files(costs: Costs, output: str | Path) -> Path:
    """Write `costs.json`, `costs.csv` and `report.html` into `output`, each whole or not at all."""
    output = Path(output)
    page = output / "report.html"
    atomic_write(output / "costs.json", costs.to_json())
    atomic_write(output / "costs.csv", to_csv(costs))
    atomic_write(page, to_html(costs))
    return page


def to_csv(costs: Costs) -> str:
    """One line per edge and quantity: `edge,quantity,unit,value`."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("edge", "quantity", "unit", "value"))
    for edge in costs.edges:
        writer.writerows((edge.name, *line) for line in _quantities(edge))
    return text.getvalue()


def to_html(costs: Costs) -> str:
    """Render the page."""
    return render(
        "report.html",
        costs=costs,
        total=costs.total,
        prices=costs.prices,
        phases=PHASES,
        plots=_plots(costs),
        loss=_loss(costs),
        jobs=jobs_of(costs),
        kinds=_kinds(costs),
        training_flops=costs.total.training.cloud_flops + costs.total.edge_flops,
        watts=watts_of(costs),
        whose=whose(costs.bill),
        parts=PARTS,
    )


def _kinds(costs: Costs) -> dict[tuple[str, ...], list[str]]:
    """Names of the edges by what they ran: model, mode, cut, codecs."""
    found: dict[tuple[str, ...], list[str]] = {}
    for edge in costs.edges:
        codecs = "/".join(dict.fromkeys(edge.codecs.values()))
        found.setdefault((edge.model, ran(edge), edge.cut, codecs), []).append(edge.name)
    return found


def jobs_of(costs: Costs) -> list[list[ModeCost]]:
    """The rows of `modes` by whose job they are: the mode that ran, then the others."""
    found: dict[tuple[str, ...], list[ModeCost]] = {}
    for mode in costs.modes:
        found.setdefault(tuple(mode.edges), []).append(mode)
    return list(found.values())


def watts_of(costs: Costs) -> str:
    """What edges and clouds are taken to draw, and who says so."""
    found: dict[str, None] = {}
    for edge in costs.edges:
        pair = costs.prices.watts(edge.device, edge.cloud_device)
        kinds = ("an edge", edge.device, "edge_watts"), ("the cloud", edge.cloud_device, "cloud_watts")
        for watts, (whom, device, price) in zip(pair, kinds, strict=True):
            kind = device.partition(":")[0] or "unknown device"
            found[f"{watts:g} W for {whom} ({kind}), {costs.price_sources.get(price, ASSUMED)}"] = None
    return "; ".join(found)


def _plots(costs: Costs) -> dict[str, Any]:
    from markupsafe import Markup

    from tightbeam.edge.report import plots

    seconds = {
        edge.name: {label: getattr(edge.seconds, field) for field, label in PHASES.items()}
        for edge in costs.edges
    }
    flops = {
        edge.name: {"edge": edge.edge_flops / 1e12, "cloud": sum(edge.cloud_flops.values()) / 1e12}
        for edge in costs.edges
    }
    pictures = {
        "loss": plots.loss_svg(costs.edges),
        "bytes": plots.bytes_svg(costs.edges),
        "seconds": plots.bars_svg("seconds", seconds, "seconds"),
        "flops": plots.bars_svg("flops", flops, "TFLOP"),
    }
    return {name: Markup(svg) for name, svg in pictures.items()}  # noqa: S704  # our own drawing; texts escaped


def _loss(costs: Costs) -> tuple[float, float, int] | None:
    """Mean first and last evaluation loss over the edges that evaluated, and how many did."""
    evaluated = [edge.eval_loss for edge in costs.edges if edge.eval_loss]
    if not evaluated:
        return None
    first, last = (sum(losses[at][1] for losses in evaluated) / len(evaluated) for at in (0, -1))
    return first, last, len(evaluated)


def _quantities(edge: Edge) -> list[tuple[str, str, float]]:
    lines: list[tuple[str, str, float]] = [
        ("training_tokens", "tokens", edge.training_tokens),
        ("evaluation_tokens", "tokens", edge.evaluation_tokens),
        ("optimizer_steps", "steps", edge.optimizer_steps),
        ("edge_flops", "flop", edge.edge_flops),
        ("peak_memory", "bytes", edge.peak_memory_bytes),
        ("resent", "bytes", edge.resent_bytes),
        ("disputed", "bytes", edge.disputed_bytes),
    ]
    for kind, moved in edge.traffic.items():
        lines += [(f"{kind}_{name.removesuffix('_bytes')}", "bytes", n) for name, n in asdict(moved).items()]
    lines += [(f"{kind}_cloud_flops", "flop", flops) for kind, flops in edge.cloud_flops.items()]
    lines += [(f"{phase}_seconds", "s", value) for phase, value in edge.seconds.model_dump().items()]
    return lines
