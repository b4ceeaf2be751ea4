"""Draws step.svg from the numbered stops of docs/architecture.md: edge left, cloud right, the wire between.

    python docs/images/draw_step.py

The colours follow the reader's light or dark setting. The picture holds nothing that the page does not.
"""

import re
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

__all__ = ["Stop", "draw", "stops"]

HERE = Path(__file__).parent
_ROW = re.compile(r"^\| (\d+) \| (edge|cloud) \| `([\w/]+\.py):([\w.]+)` \| (.+) \|$", re.M)

_WIDTH, _LANE, _GAP = 1060, 400, 200  # pixels
_LEFT, _RIGHT = 30, 30 + _LANE + _GAP
_STEP = 44  # from stop to stop
_STYLE = """
.paper{fill:#fff} .lane{fill:#f5f6f8} .ink{fill:#1b1f24} .muted{fill:#59626e}
.edge{fill:#2f6fb5} .cloud{fill:#a8501a} .wire{stroke:#59626e;fill:none;stroke-width:2} .tip{fill:#59626e}
.thread{stroke:#c3c9d1;stroke-width:2} .number{fill:#fff}
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif} .small{font-size:12px}
.name{font:600 13.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.head{font-size:17px;font-weight:600}
.number{font-size:12px;font-weight:600;text-anchor:middle} .mid{text-anchor:middle}
@media (prefers-color-scheme:dark){
.paper{fill:#14171b} .lane{fill:#1d2126} .ink{fill:#e8eaed} .muted{fill:#a2abb6}
.edge{fill:#6aa8ea} .cloud{fill:#eb9a55} .wire{stroke:#a2abb6} .tip{fill:#a2abb6} .thread{stroke:#454c55}
.number{fill:#14171b}}
"""


@dataclass(frozen=True, slots=True)
class Stop:
    """One numbered line of the page."""

    number: int
    side: str  # edge or cloud
    file: str
    name: str
    text: str


def stops(page: str) -> list[list[Stop]]:
    """The stops of each section that has any: the forward, then the backward."""
    sections = (_ROW.findall(section) for section in page.split("\n## "))
    return [[Stop(int(row[0]), *row[1:]) for row in section] for section in sections if section]


def draw(page: str) -> str:
    """The picture of a page as SVG."""
    forward, backward = stops(page)
    parts: list[str] = []
    top = _section(parts, "Forward", forward, 20, ("hidden [N, d]", "hidden [N, d]"))
    height = _section(parts, "Backward", backward, top + 24, ("gradient [N, d]", "gradient [N, d]"))
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height + 20}" role="img">',
            "<title>One training step from the edge to the cloud and back</title>",
            f"<style>{_STYLE}</style>",
            f'<defs>{tip}<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
            f'<rect class="paper" width="{_WIDTH}" height="{height + 20}" rx="10"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _section(parts: list[str], title: str, section: list[Stop], top: int, labels: tuple[str, str]) -> int:
    """Draw one way to the cloud and back, and return where it ends."""
    out, there, back = (list(group) for _, group in groupby(section, key=lambda stop: stop.side))
    first = top + 70
    rows = max(len(there), len(out) + len(back) + 1)
    bottom = first + (rows - 1) * _STEP
    for x, word in ((_LEFT, "edge: data, labels, adapters"), (_RIGHT, "cloud: the frozen trunk")):
        parts.append(
            f'<rect class="lane" x="{x}" y="{top}" width="{_LANE}" height="{bottom + 34 - top}" rx="8"/>'
        )
        parts.append(f'<text class="ink head" x="{x + 20}" y="{top + 31}">{word}</text>')
    middle = _LEFT + _LANE + _GAP // 2
    parts.append(f'<text class="ink head mid" x="{middle}" y="{top + 31}">{title}</text>')
    gone = _lane(parts, out, _LEFT, first)
    returned = bottom - (len(back) - 1) * _STEP
    cloud_top = max(first, returned - (len(there) - 1) * _STEP)  # so that the way back is straight
    _lane(parts, back, _LEFT, returned)
    left = _lane(parts, there, _RIGHT, cloud_top)
    _arrow(parts, _LEFT + _LANE + 6, gone, _RIGHT - 6, cloud_top, labels[0])
    _arrow(parts, _RIGHT - 6, left, _LEFT + _LANE + 6, returned, labels[1])
    return bottom + 34


def _lane(parts: list[str], group: list[Stop], x: int, y: int) -> int:
    """Draw stops one below the other, and return the height of the last."""
    last = y + (len(group) - 1) * _STEP
    parts.append(f'<line class="thread" x1="{x + 30}" y1="{y}" x2="{x + 30}" y2="{last}"/>')
    for index, stop in enumerate(group):
        at = y + index * _STEP
        parts.append(f'<circle class="{stop.side}" cx="{x + 30}" cy="{at}" r="12"/>')
        parts.append(f'<text class="number" x="{x + 30}" y="{at + 4}">{stop.number}</text>')
        parts.append(f'<text class="ink name" x="{x + 54}" y="{at - 1}">{escape(stop.name)}</text>')
        short = re.sub(r"^\w+/tightbeam/", "", stop.file)
        parts.append(f'<text class="muted small" x="{x + 54}" y="{at + 15}">{escape(short)}</text>')
    return last


def _arrow(parts: list[str], x1: int, y1: int, x2: int, y2: int, label: str) -> None:
    """Across the wire by one elbow in the middle of the gap, labelled where it starts."""
    middle = (x1 + x2) // 2
    parts.append(f'<path class="wire" marker-end="url(#tip)" d="M{x1} {y1}H{middle}V{y2}H{x2}"/>')
    x, y = (min(x1, x2) + max(x1, x2)) // 2, max(y1, y2)
    parts.append(f'<text class="ink mid" x="{x}" y="{y + 20}">{label}</text>')
    parts.append(f'<text class="muted small mid" x="{x}" y="{y + 37}">sealed records, gRPC</text>')


if __name__ == "__main__":
    text = draw((HERE.parent / "architecture.md").read_text(encoding="utf-8"))
    (HERE / "step.svg").write_text(text, encoding="utf-8")
