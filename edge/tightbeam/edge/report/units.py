"""Quantities as people read them: three figures and a decimal prefix, as on bills (1 MB = 1e6 bytes)."""

import math

__all__ = ["bytes_text", "count_text", "flops_text", "joules_text", "money_text", "seconds_text"]

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def bytes_text(num_bytes: float) -> str:
    """Spell bytes, such as "12.3 MB"."""
    return _prefixed(num_bytes, "B")


def flops_text(flops: float) -> str:
    """Spell floating point operations, such as "1.20 TFLOP"."""
    return _prefixed(flops, "FLOP")


def joules_text(joules: float) -> str:
    """Spell joules, such as "4.50 kJ"."""
    return _prefixed(joules, "J")


def count_text(count: int) -> str:
    """Spell a count with thin spaces between thousands."""
    return f"{count:,}".replace(",", "\u202f")


def seconds_text(seconds: float) -> str:
    """Spell a duration: "0.12 s", "45.3 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 120:
        return f"{_three_figures(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def money_text(amount: float, currency: str) -> str:
    """Spell money with two decimals, or two figures when that would be nothing: "0.0031 USD"."""
    if amount == 0 or amount >= 0.1:
        return f"{amount:.2f} {currency}"
    return f"{amount:.{1 - math.floor(math.log10(amount))}f} {currency}"


def _prefixed(value: float, unit: str) -> str:
    # Compared after rounding to three figures, so that 999.9 k becomes 1.00 M.
    rounded = float(f"{value:.3g}")
    scale, prefix = next(((s, p) for s, p in _PREFIXES if rounded >= s), (1.0, ""))
    return f"{_three_figures(value / scale)} {prefix}{unit}"


def _three_figures(value: float) -> str:
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(float(f"{value:.3g}"))))
    return f"{value:.{min(decimals, 4)}f}"
