"""Samples as packed rows, the tokens that begin several of them alike once.

Samples with one chat template or system prompt have their first tokens in common, and so every hidden state
of them: below the cut, in the ladder and above the trunk. The gradient of a shared row is the sum over its
tokens. Dropout, if there is any, is drawn once for a shared row.

N = tokens, M = rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from tightbeam.common.backbone import Segments, SegmentTable, SharedRows
from tightbeam.common.wire.prefixes import SharedPrefixes

__all__ = ["PackedRows"]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Samples end to end, and which of their tokens share a row."""

    input_ids_N: Tensor
    segments: Segments
    shared: SharedRows | None  # None: every token has its own row

    @classmethod
    def of(cls, input_ids_N: Tensor, lengths: tuple[int, ...]) -> Self:
        """Positions count from 0 in every sample."""
        segments = Segments(lengths, torch.cat([torch.arange(n) for n in lengths]))
        prefixes = SharedPrefixes.find(input_ids_N, segments)
        if prefixes is None:
            return cls(input_ids_N, segments, None)
        found = prefixes.row_map(segments.positions_N)
        device = input_ids_N.device
        return cls(input_ids_N, segments, SharedRows(found.source_N.to(device), found.crossing_M.to(device)))

    @classmethod
    def of_samples(cls, samples: Iterable[Sequence[int]], device: torch.device) -> Self:
        """From the token ids of each sample."""
        ids = [list(sample) for sample in samples]
        input_ids_N = torch.tensor([token for sample in ids for token in sample], device=device)
        return cls.of(input_ids_N, tuple(map(len, ids)))

    @property
    def num_rows(self) -> int:
        """M."""
        return len(self.input_ids_N if self.shared is None else self.shared.token_M)

    def inputs(self) -> dict[str, Any]:
        """Arguments of a forward of a model in `PACKED_ATTENTION`."""
        device = self.input_ids_N.device
        table = SegmentTable(self.segments, device, self.shared)
        return {
            "input_ids": table.pick(self.input_ids_N)[None],
            "position_ids": table.row_positions[None],
            "segments": table,
        }
