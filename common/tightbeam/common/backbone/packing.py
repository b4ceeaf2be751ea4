"""Packed rows: sequences laid end to end, so that padding is never computed on nor sent.

N = real tokens, S = segments, B = batch, T = padded length, D = hidden size.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tightbeam.common.errors import ProtocolError

__all__ = ["Packer", "Segments"]


@dataclass(frozen=True, slots=True)
class Segments:
    """Which rows belong together. A segment is one sequence; no attention crosses its borders."""

    lengths: tuple[int, ...]  # [S], each at least 1
    positions_N: Tensor  # int64, CPU: the position index of each token, as the edge's model counts

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or sum(self.lengths) != self.num_tokens:
            raise ProtocolError(f"Segment lengths {self.lengths} do not add up to {self.num_tokens} tokens.")

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.positions_N.numel()

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """`[start, stop)` of each segment."""
        ends = list(accumulate(self.lengths))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def runs(self) -> tuple[list[int], list[int]]:
        """Positions as runs of consecutive integers.

        First values and counts. Almost always one per segment.
        """
        breaks = (torch.diff(self.positions_N) != 1).nonzero().flatten() + 1
        starts = [0, *breaks.tolist()]
        return self.positions_N[starts].tolist(), [
            b - a for a, b in zip(starts, [*starts[1:], self.num_tokens], strict=True)
        ]

    @classmethod
    def from_runs(cls, lengths: tuple[int, ...], starts: list[int], counts: list[int]) -> "Segments":
        """Inverse of `runs`."""
        if len(starts) != len(counts) or not starts:
            raise ProtocolError("Position runs are malformed.")
        return cls(lengths, torch.cat([torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]))


class Packer:
    """Moves one padded batch `[B, T, D]` to packed rows `[N, D]` and back; both ways are differentiable."""

    def __init__(self, shape_BT: tuple[int, int], mask_BT: Tensor | None, positions_BT: Tensor) -> None:
        self.shape_BT = shape_BT
        positions_BT = positions_BT.expand(shape_BT).to("cpu", torch.int64)
        keep_BT = None if mask_BT is None else mask_BT.to("cpu", torch.bool)
        if keep_BT is None or bool(keep_BT.all()):
            self._index_N = None
            positions_N = positions_BT.reshape(-1)
        else:
            self._index_N = keep_BT.reshape(-1).nonzero().flatten()
            positions_N = positions_BT.reshape(-1)[self._index_N]
        lengths = [shape_BT[1]] * shape_BT[0] if keep_BT is None else keep_BT.sum(1).tolist()
        if mask_BT is None:
            # transformers reads restarting positions without a mask as several sequences in one row
            lengths = _split_at_restarts(lengths, positions_N)
        self.segments = Segments(tuple(n for n in lengths if n), positions_N)

    def pack(self, hidden_BTD: Tensor) -> Tensor:
        """`[B, T, D]` to `[N, D]`."""
        hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        return (
            hidden_MD
            if self._index_N is None
            else hidden_MD.index_select(0, self._index_N.to(hidden_MD.device))
        )

    def unpack(self, hidden_ND: Tensor) -> Tensor:
        """`[N, D]` to `[B, T, D]`, zeros where padding was."""
        if self._index_N is not None:
            blank_MD = hidden_ND.new_zeros(self.shape_BT[0] * self.shape_BT[1], hidden_ND.shape[-1])
            hidden_ND = blank_MD.index_copy(0, self._index_N.to(hidden_ND.device), hidden_ND)
        return hidden_ND.reshape(*self.shape_BT, -1)


def _split_at_restarts(lengths: list[int], positions_N: Tensor) -> list[int]:
    edges = {0, *accumulate(lengths)}
    edges.update(((torch.diff(positions_N) != 1).nonzero().flatten() + 1).tolist())
    ordered = sorted(edges)
    return [b - a for a, b in pairwise(ordered)]
