"""Writes the federation report: `federation.json`, `federation.csv` and one self-contained `report.html`."""

import csv
import io
from pathlib import Path
from typing import Any

from tightbeam.common.accounts.prices import Prices
from tightbeam.common.files import atomic_write
from tightbeam.edge.report.pages import render
from tightbeam.federation.accounts.alternatives import FLOWERTUNE_BUDGET_MB
from tightbeam.federation.accounts.from_ledger import account
from tightbeam.federation.accounts.schema import ClientAccount, Costs, FederationAccount, RoundAccount
from tightbeam.federation.scenario import Scenario

__all__ = ["to_csv", "to_html", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"
_SHOWN = 20  # bars in a picture; of more clients or rounds, those that moved most


def write_report(folder: Path, scenario: Scenario | None = None, prices: Prices | None = None) -> Path:
    """Sum up an experiment's folder and write the three files into it; the page's path is returned.

    Raises:
        DataError: see `account`.

    """
    found = account(folder, scenario, prices)
    atomic_write(folder / "federation.json", found.model_dump_json(indent=2) + "\n")
    atomic_write(folder / "federation.csv", to_csv(found))
    page = folder / "report.html"
    atomic_write(page, to_html(found))
    return page


def to_csv(found: FederationAccount) -> str:
    """One line per client or round, and quantity."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("of", "name", "phase", "quantity", "value"))
    parts: list[tuple[str, str, ClientAccount | RoundAccount]] = []
    parts += [("client", client.name, client) for client in found.clients]
    parts += [("round", str(one.round), one) for one in found.rounds]
    for of, name, part in parts:
        for phase, costs in (("training", part.training), ("evaluation", part.evaluation)):
            for quantity, value in costs.model_dump().items():
                writer.writerow((of, name, phase, quantity, value))
    return text.getvalue()


def to_html(found: FederationAccount) -> str:
    """Render the page."""
    whole = next(one for one in found.alternatives if one.name == "whole model at the edge")
    return render(
        "federation.html",
        _TEMPLATES,
        found=found,
        total=found.total,
        prices=found.prices,
        whose=" and ".join(dict.fromkeys(found.price_sources[n] for n in ("per_gigabyte", "per_petaflop"))),
        plots=_plots(found),
        shown=_SHOWN,
        evaluated=sum(c.first_loss is not None for c in found.clients),
        improved=sum(
            c.last_loss < c.first_loss
            for c in found.clients
            if c.first_loss is not None and c.last_loss is not None
        ),
        flowertune=(found.total.adapter_bytes / 2**20, whole.adapter_bytes / 2**20, FLOWERTUNE_BUDGET_MB),
    )


def _plots(found: FederationAccount) -> dict[str, Any]:
    from markupsafe import Markup

    from tightbeam.edge.report import plots

    curves = {
        name: [(one.round, loss) for one in found.evaluations if (loss := getattr(one, name)) is not None]
        for name in ("worst", "loss", "median", "best")
    }
    trained = [(one.round, one.loss) for one in found.rounds if one.loss is not None]
    pictures = {
        "clients": plots.bars_svg("clients", _bars(found, "clients"), "MB"),
        "rounds": plots.bars_svg("rounds", _bars(found, "rounds"), "MB"),
        "losses": plots.curves_svg(
            "losses",
            {"mean" if name == "loss" else name: points for name, points in curves.items() if points}
            | ({"training": trained} if trained else {}),
            "rounds",
            "loss, nats per token",
        ),
    }
    return {name: Markup(svg) for name, svg in pictures.items()}  # noqa: S704  # our own drawing


def _bars(found: FederationAccount, of: str) -> dict[str, dict[str, float]]:
    if of == "clients":
        rows = [(client.name, client.training, client.evaluation) for client in found.clients]
    else:
        rows = [(f"round {one.round}", one.training, one.evaluation) for one in found.rounds]
    heaviest = sorted(rows, key=lambda row: -(row[1].moved_bytes + row[2].moved_bytes))
    kept = {name for name, _, _ in heaviest[:_SHOWN]}
    return {name: _parts(training, evaluation) for name, training, evaluation in rows if name in kept}


def _parts(training: Costs, evaluation: Costs) -> dict[str, float]:
    return {
        "activations": training.activation_bytes / 1e6,
        "evaluation": evaluation.activation_bytes / 1e6,
        "adapters": (training.adapter_bytes + evaluation.adapter_bytes) / 1e6,
        "weights": (training.weight_bytes + evaluation.weight_bytes) / 1e6,
    }
