"""Draws docs/images/modes.svg from docs/data/modes.jsonl, the output of `benchmarks/modes.py --summary`.

    python benchmarks/plot_modes.py

Share of full LoRA's gain against bytes per token of the data set, which span two decades: a logarithmic axis.
Full LoRA, where nothing crosses, is the line at 100 %. The colours follow the reader's light or dark setting.
"""

import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["Point", "draw", "read"]

DOCS = Path(__file__).parents[1] / "docs"
_WIDTH, _HEIGHT = 860, 470  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 836, 34, 412
_LOW, _HIGH = 0.79, 1.01  # share
_FEWEST, _MOST = 400, 60_000  # bytes per token
_FAMILIES = {"ushape": "every step", "freeze": "freezes on the way", "top": "once", "side": "once, with taps"}
_SIDES = {  # pixels from a point to its label; right of it unless said otherwise
    "ushape-4:4-wide": (10, -4),
    "ushape-4:4": (10, 12),
    "ushape-4:4-wide-int8": (-2, -12),
    "ushape-4:4-wide-int4-int8": (-10, -2),
    "freeze-4:8-one-wide": (-1, 20),
    "side-12-bypass": (-10, 5),
    "top-8-wide": (-10, 4),
    "top-8-noisy": (-10, 0),
    "freeze-4:8-half-small": (4, -10),
    "freeze-4:8-half-small-int4-int8": (10, 11),
    "side-8": (10, 10),
}
_STYLE = """
.paper{fill:#fff} .ink{fill:#1b1f24} .muted{fill:#59626e} .grid{stroke:#d9dde3} .base{stroke:#59626e}
.ushape{fill:#2f6fb5;stroke:#2f6fb5} .freeze{fill:#a8501a;stroke:#a8501a} .top{fill:#12776a;stroke:#12776a}
.side{fill:#7a4fb0;stroke:#7a4fb0}
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;stroke:none} .mid{text-anchor:middle}
.end{text-anchor:end} .head{font-weight:600} .bar{stroke-width:1.5} .base{stroke-dasharray:5 4}
@media (prefers-color-scheme:dark){
.paper{fill:#14171b} .ink{fill:#e8eaed} .muted{fill:#a2abb6} .grid{stroke:#343a42} .base{stroke:#a2abb6}
.ushape{fill:#6aa8ea;stroke:#6aa8ea} .freeze{fill:#eb9a55;stroke:#eb9a55} .top{fill:#4cc3b2;stroke:#4cc3b2}
.side{fill:#b794e6;stroke:#b794e6}}
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One mode, as the mean of its seeds."""

    mode: str
    bytes_per_token: float  # of the data set, over the whole run
    share: float  # of full LoRA's gain
    spread: float  # highest less lowest share of the seeds; drawn as a bar around the mean

    @property
    def family(self) -> str:
        """How the mode uses the trunk."""
        return self.mode.partition("-")[0]


def read(path: Path) -> list[Point]:
    """The modes of which something crosses, on three epochs of the Jargon File."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Point(row["mode"], row["bytes_per_token"], row["share_of_full_lora_gain"], row["spread"])
        for row in rows
        if row["bytes_per_token"] and row["data"] == "jargon" and row["epochs"] == 3
    ]


def draw(points: list[Point]) -> str:
    """The picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Share of full LoRA\'s gain that each mode keeps, against the bytes it moves per token">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>',
        *_axes(),
        *(_mark(point) for point in points),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _x(bytes_per_token: float) -> float:
    share = math.log(bytes_per_token / _FEWEST) / math.log(_MOST / _FEWEST)
    return _LEFT + share * (_RIGHT - _LEFT)


def _y(share: float) -> float:
    return _BOTTOM - (share - _LOW) / (_HIGH - _LOW) * (_BOTTOM - _TOP)


def _axes() -> list[str]:
    parts = []
    for percent in range(80, 101, 5):
        y, style = _y(percent / 100), "base" if percent == 100 else "grid"
        parts.append(f'<line class="{style}" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="muted end" x="{_LEFT - 8}" y="{y + 4:.1f}">{percent} %</text>')
    for size, label in (
        (500, "500 B"),
        (1e3, "1 kB"),
        (2e3, "2 kB"),
        (5e3, "5 kB"),
        (1e4, "10 kB"),
        (2e4, "20 kB"),
    ):
        x = _x(size)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>')
        parts.append(f'<text class="muted mid" x="{x:.1f}" y="{_BOTTOM + 20}">{label}</text>')
    parts.append(
        f'<text class="muted" x="{_LEFT + 6}" y="{_y(1) + 17:.1f}">full LoRA, nothing crosses</text>'
    )
    parts.append(f'<text class="ink head" x="{_LEFT - 50}" y="18">share of full LoRA\'s gain</text>')
    middle = (_LEFT + _RIGHT) / 2
    words = "bytes per token of the data set, whole run of three epochs"
    return [*parts, f'<text class="ink head mid" x="{middle}" y="{_BOTTOM + 44}">{words}</text>']


def _mark(point: Point) -> str:
    x, y, (right, down) = _x(point.bytes_per_token), _y(point.share), _SIDES.get(point.mode, (10, 5))
    low, high = _y(point.share - point.spread / 2), _y(point.share + point.spread / 2)
    side = "ink end" if right < 0 else "ink"
    bar = f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
    return (
        f'<g class="{point.family}">{bar}<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>'
        f'<text class="{side}" x="{x + right:.1f}" y="{y + down:.1f}">{escape(point.mode)}</text>'
    )


def _legend() -> list[str]:
    parts, x = [], _RIGHT - 440
    for family, words in _FAMILIES.items():
        parts.append(f'<circle class="{family}" cx="{x}" cy="14" r="4.5"/>')
        parts.append(f'<text class="ink" x="{x + 10}" y="18">{words}</text>')
        x += 34 + 7 * len(words)
    return parts


if __name__ == "__main__":
    (DOCS / "images" / "modes.svg").write_text(draw(read(DOCS / "data" / "modes.jsonl")), encoding="utf-8")
