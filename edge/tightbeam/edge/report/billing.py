"""What an edge's run is billed for, line by line: which part of it, by which price, and whose price.

Training is billed apart from evaluations, and the download of weights apart from both. What fills a cache
counts as training: it cannot be told which of its steps serve which. Each start of a process is billed by the
prices that the cloud announced to it.
"""

from collections.abc import Callable, Iterable, Sequence

from tightbeam.common.accounts.prices import Bill, Energy, Prices, Tariff
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.errors import DataError
from tightbeam.edge.report.reading import RunRecords
from tightbeam.edge.report.schema import BillLine, Scope

__all__ = [
    "DOWNLOAD",
    "EVALUATION",
    "TRAINING",
    "bill_of",
    "lines_of",
    "merged",
    "require_one_currency",
    "scope",
    "whose",
]

TRAINING = "training"
EVALUATION = "evaluation"
DOWNLOAD = "download"
_ELECTRICITY = "electricity"


def lines_of(
    record: RunRecords,
    billed: Sequence[StepRow],
    in_evaluation: Callable[[StepRow], bool],
    energy: Energy,
    table: Prices | None,
) -> list[BillLine]:
    """The lines of one run folder; `billed` are its steps, each key once."""
    lines: list[BillLine] = []
    starts = {row.run: row for row in record.runs}
    for start in starts.values():
        tariff = Tariff.of(start.prices, table)

        def line(part: str, unit: str, used: float, price: str, tariff: Tariff = tariff) -> BillLine:
            per = {"bytes": 1e9, "flops": 1e15, "joules": 3.6e6}[unit]
            rate = getattr(tariff.prices, price)
            currency, source = tariff.prices.currency, tariff.sources[price]
            return BillLine(
                part=part,
                unit=unit,
                used=used,
                rate=rate,
                currency=currency,
                source=source,
                money=used / per * rate,
            )

        own = [row for row in billed if starts.get(row.run, record.runs[-1]) is start]
        for part, evaluates in ((TRAINING, False), (EVALUATION, True)):
            rows = [row for row in own if in_evaluation(row) is evaluates]
            lines.append(line(part, "bytes", sum(row.bytes.wire_total_bytes for row in rows), "per_gigabyte"))
            lines.append(line(part, "flops", sum(row.cloud_flops for row in rows), "per_petaflop"))
        moved = [row for row in record.transfers if starts.get(row.run, record.runs[-1]) is start]
        lines.append(
            line(
                DOWNLOAD,
                "bytes",
                sum(row.wire_up_bytes + row.wire_down_bytes for row in moved),
                "per_gigabyte",
            )
        )
        if start is record.runs[-1]:
            lines.append(line(_ELECTRICITY, "joules", energy.edge_joules, "per_kilowatt_hour"))
    return merged(lines)


def merged(lines: Iterable[BillLine]) -> list[BillLine]:
    """One line of all that have part, price and source in common; in the order of the first of each."""
    found: dict[tuple[object, ...], BillLine] = {}
    for line in lines:
        key = (line.part, line.unit, line.rate, line.currency, line.source)
        if before := found.get(key):
            line = before.model_copy(
                update={"used": before.used + line.used, "money": before.money + line.money}
            )
        found[key] = line
    return list(found.values())


def require_one_currency(lines: Iterable[BillLine]) -> None:
    """Raise `DataError` for money that cannot be added up."""
    if len(found := sorted({line.currency for line in lines})) > 1:
        raise DataError(
            f"These runs were billed in {' and '.join(found)}, which cannot be added up.",
            cure="Report each on its own, or give --prices FILE with a currency and prices for all.",
        )


def bill_of(lines: Sequence[BillLine]) -> Bill:
    """Their sum."""
    by_unit = {
        unit: sum(line.money for line in lines if line.unit == unit) for unit in ("bytes", "flops", "joules")
    }
    return Bill(
        traffic=by_unit["bytes"],
        cloud_compute=by_unit["flops"],
        edge_electricity=by_unit["joules"],
        total=sum(by_unit.values()),
    )


def scope(lines: Sequence[BillLine], part: str) -> Scope:
    """What one part of a run moved, had computed, and costs."""
    own = [line for line in lines if line.part == part]
    used = {unit: sum(line.used for line in own if line.unit == unit) for unit in ("bytes", "flops")}
    return Scope(
        wire_bytes=round(used["bytes"]),
        cloud_flops=round(used["flops"]),
        money=sum(line.money for line in own),
    )


def whose(lines: Iterable[BillLine]) -> str:
    """Who says what the cloud asks, and what electricity costs: in words, for what was used."""
    found: dict[str, set[str]] = {}
    for line in lines:
        if line.used:
            found.setdefault("electricity" if line.part == _ELECTRICITY else "cloud", set()).add(line.source)
    return "; ".join(f"{what}: {' and '.join(sorted(sources))}" for what, sources in found.items())
