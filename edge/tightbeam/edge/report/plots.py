"""The report's pictures: matplotlib drawings as inline SVG that takes its colours from the page.

Everything is drawn in placeholder colours, which become CSS variables afterwards: the same picture is then
right in light, in dark and on paper. Text stays text, in the page's own font. This is the only module that
loads matplotlib.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tightbeam.edge.report.schema import Edge, TimeBin

__all__ = ["NUM_COLOURS", "bars_svg", "bytes_svg", "curves_svg", "loss_svg"]

NUM_COLOURS: Final = 7
_INK, _MUTED, _GRID = "#0a0b01", "#0a0b02", "#0a0b03"
_SERIES: Final = tuple(f"#0a0c{index:02x}" for index in range(1, NUM_COLOURS + 1))
_VARIABLES: Final = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    **{colour: f"var(--c{index})" for index, colour in enumerate(_SERIES, 1)},
}
_WIDTH_INCHES = 9.6
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "legend.handlelength": 1.2,
}


def loss_svg(edges: Sequence[Edge]) -> str:
    """Training loss (faint) and evaluation loss (marked) of each edge over optimizer steps."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(3.0)
        for index, edge in enumerate(edges):
            colour = _SERIES[index % NUM_COLOURS]
            if edge.train_loss:
                axes.plot(*zip(*edge.train_loss, strict=True), color=colour, linewidth=1.1, alpha=0.6)
            if edge.eval_loss:
                axes.plot(
                    *zip(*edge.eval_loss, strict=True),
                    color=colour,
                    linewidth=1.8,
                    marker="o",
                    markersize=4,
                    label=f"{edge.name}, evaluation",
                )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
        axes.grid(axis="y")
        _legend(axes)
        return _svg(figure, "loss")


def curves_svg(
    name: str, curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str
) -> str:
    """One marked curve per name, in the order given."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(3.0)
        for index, (label, points) in enumerate(curves.items()):
            colour = _SERIES[index % NUM_COLOURS]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=label)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if all(float(x).is_integer() for points in curves.values() for x, _ in points):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # no half rounds
        axes.margins(x=0.01)
        axes.grid(axis="y")
        _legend(axes)
        return _svg(figure, name)


def bytes_svg(edges: Sequence[Edge]) -> str:
    """Wire bytes per second of all edges over time: up above the line, down below it."""
    bins = [part for edge in edges for part in edge.timeline]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(3.0)
        starts = sorted({part.start_s for part in bins})
        floor = {"up": [0.0] * len(starts), "down": [0.0] * len(starts)}
        for kind, colour in (("forward", _SERIES[0]), ("backward", _SERIES[3])):
            for way, sign in (("up", 1), ("down", -1)):
                rates = _rates(bins, starts, f"{kind}_{way}_bytes")
                heights = [sign * rate for rate in rates]
                axes.bar(
                    starts,
                    heights,
                    width=bins[0].seconds * 0.86,
                    align="edge",
                    bottom=floor[way],
                    color=colour,
                    label=kind if way == "up" else None,
                )
                floor[way] = [low + height for low, height in zip(floor[way], heights, strict=True)]
        axes.axhline(0, color=_MUTED, linewidth=0.8)
        axes.set_xlabel("seconds since the start")
        axes.set_ylabel("MB/s, up above, down below")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
        axes.margins(x=0.01)
        axes.grid(axis="y")
        _legend(axes)
        return _svg(figure, "bytes")


def bars_svg(name: str, rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """One stacked bar per row; parts keep their colour by position."""
    parts = list(next(iter(rows.values())))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(0.75 + 0.34 * len(rows))
        left = dict.fromkeys(rows, 0.0)
        for index, part in enumerate(parts):
            widths = [row[part] for row in rows.values()]
            axes.barh(
                list(rows), widths, left=list(left.values()), height=0.62, color=_SERIES[index], label=part
            )
            left = {row: left[row] + rows[row][part] for row in rows}
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.01)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        return _svg(figure, name)


def _rates(bins: Sequence[TimeBin], starts: Sequence[float], key: str) -> list[float]:
    """MB per second in each slice, all edges together."""
    sums = dict.fromkeys(starts, 0.0)
    for part in bins:
        sums[part.start_s] += getattr(part, key) / part.seconds / 1e6
    return list(sums.values())


def _canvas(height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=min(len(labels), 5))


def _svg(figure: Figure, name: str) -> str:
    """Inline SVG with CSS colours, the page's font and ids that no other picture has."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', text, count=1)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    return text
