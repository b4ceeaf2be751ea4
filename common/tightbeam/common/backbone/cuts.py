"""A cut `k:m`: the first k and the last m blocks stay at the edge, the trunk between runs in the cloud."""

import re
from dataclasses import dataclass
from typing import Self

from tightbeam.common.errors import CutError, UsageError

__all__ = ["Cut", "CutPolicy"]


@dataclass(frozen=True, slots=True)
class Cut:
    """`bottom` blocks `[0, k)` and `top` blocks `[L-m, L)` at the edge; counts of blocks."""

    bottom: int
    top: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `"k:m"`, e.g. `"4:4"`."""
        if not re.fullmatch(r"\d{1,4}:\d{1,4}", text):
            raise CutError(f"{text!r} is not a cut.", cure='Write it as bottom:top, for example "4:4".')
        bottom, top = text.split(":")
        return cls(int(bottom), int(top))

    def __str__(self) -> str:
        return f"{self.bottom}:{self.top}"

    def trunk(self, num_blocks: int) -> range:
        """Indices of the blocks that run in the cloud."""
        if self.bottom + self.top >= num_blocks:
            raise CutError(
                f"Cut {self} leaves no trunk: the model has {num_blocks} blocks.",
                cure=f"Choose bottom + top of at most {num_blocks - 1}.",
            )
        return range(self.bottom, num_blocks - self.top)


@dataclass(frozen=True, slots=True)
class CutPolicy:
    """Which cuts a cloud serves. The maxima bound how much of the backbone an edge may download."""

    min_bottom: int = 1
    min_top: int = 1
    max_bottom: int = 16
    max_top: int = 16

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `"min_bottom=1,min_top=1,max_bottom=8,max_top=8"`; what is absent keeps its default."""
        values: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, number = item.partition("=")
            if name not in cls.__dataclass_fields__ or not number.isdigit():
                raise UsageError(
                    f"Cut policy item {item!r} is not understood.",
                    cure=f"Write NAME=NUMBER with a name of {', '.join(cls.__dataclass_fields__)}.",
                )
            values[name] = int(number)
        return cls(**values)

    def check(self, cut: Cut, num_blocks: int) -> range:
        """The trunk of an allowed cut; `CutError` says which side is out of bounds."""
        for side, value, low, high in (
            ("bottom", cut.bottom, self.min_bottom, self.max_bottom),
            ("top", cut.top, self.min_top, self.max_top),
        ):
            if not low <= value <= high:
                raise CutError(
                    f"Cut {cut}: this cloud allows {low} to {high} {side} blocks, not {value}.",
                    cure=f"Choose a {side} within that range, or ask the operator for another --cut-policy.",
                )
        return cut.trunk(num_blocks)

    def loaded(self, num_blocks: int) -> range:
        """The blocks that some allowed cut runs in the cloud."""
        return range(self.min_bottom, num_blocks - self.min_top)
