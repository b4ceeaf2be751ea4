"""Leading rows that sequences of one step have in common cross once.

Attention is causal in every backbone that can be cut, so the hidden state of a token follows from the tokens
up to it and their positions alone: below the cut, behind the trunk and in every tap. Samples of one step that
begin alike, with a chat template or a system prompt, therefore have the same rows there, as long as nothing
random is on the way and no gradient, which depends on what follows, is asked for.

`SharedPrefixes` is what a header says, `RowMap` what both ends make of it. Lengths and positions of a step
stay those of whole sequences.

N = tokens, M = rows that cross, D = hidden size, S = sequences.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tightbeam.common.backbone.packing import Segments
from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.codecs import codec
from tightbeam.proto.backbone_pb2 import FORWARD, StepRequest

__all__ = ["RowMap", "SharedPrefixes"]


@dataclass(frozen=True, slots=True)
class RowMap:
    """Which rows of a step cross, and where each token's row is among them."""

    crossing_M: Tensor  # int64, ascending
    source_N: Tensor  # int64, into the rows that cross

    @property
    def num_shared(self) -> int:
        """Rows that do not cross."""
        return len(self.source_N) - len(self.crossing_M)

    def pick(self, tensor_ND: Tensor) -> Tensor:
        """The rows that cross, `[M, D]`."""
        return tensor_ND[self.crossing_M.to(tensor_ND.device)]

    def spread(self, tensor_MD: Tensor) -> Tensor:
        """Every token's row, `[N, D]`."""
        return tensor_MD[self.source_N.to(tensor_MD.device)]

    def spread_payload(self, codec_name: str, payload: Tensor, size: int) -> Tensor:
        """The payload of `spread`'s rows from that of those that crossed; a row is coded by itself."""
        planes, offset, num_rows = [], 0, len(self.crossing_M)
        for num_bytes in codec(codec_name).planes(size):
            end = offset + num_rows * num_bytes
            planes.append(self.spread(payload[offset:end].view(num_rows, num_bytes)).flatten())
            offset = end
        return torch.cat(planes)


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """For each sequence, how many of its leading rows are those of an earlier one, and of which."""

    lengths: tuple[int, ...]  # tokens, [S]
    of: tuple[int, ...]  # [S]; 0 where nothing is shared
    rows: tuple[int, ...]  # [S]

    @classmethod
    def find(cls, input_ids_N: Tensor, segments: Segments) -> Self | None:
        """The longest for each sequence: equal tokens at equal positions. None where no row is shared."""
        tokens = list(zip(input_ids_N.tolist(), segments.positions_N.tolist(), strict=True))
        children: dict[tuple[int, tuple[int, int]], int] = {}  # a tree of all prefixes, its root is 0
        first = [0]  # which sequence came to a node first
        of, rows = [], []
        for number, (start, stop) in enumerate(segments.bounds):
            node, place = 0, start
            while place < stop and (child := children.get((node, tokens[place]))) is not None:
                node, place = child, place + 1
            of.append(first[node])
            rows.append(place - start)
            for token in tokens[place:stop]:
                children[node, token] = node = len(first)
                first.append(number)
        return cls(segments.lengths, tuple(of), tuple(rows)) if any(rows) else None

    @classmethod
    def read(cls, header: StepRequest) -> Self | None:
        """What a request says; None for one in which every row crosses.

        Raises `ProtocolError` for one that contradicts itself, or that a gradient will follow.
        """
        if not header.prefix_of and not header.prefix_rows:
            return None
        if header.kind != FORWARD or header.keep:
            raise ProtocolError("Only a forward that no backward will follow may leave out shared rows.")
        found = cls(tuple(header.lengths), tuple(header.prefix_of), tuple(header.prefix_rows))
        if not len(found.lengths) == len(found.of) == len(found.rows):
            raise ProtocolError("A request does not say of each sequence which rows it shares.")
        for number, (of, rows) in enumerate(zip(found.of, found.rows, strict=True)):
            if of >= max(number, 1):
                raise ProtocolError("A sequence of a request shares rows with one that is not before it.")
            if rows > (min(found.lengths[number], found.lengths[of]) if number else 0):
                raise ProtocolError("A sequence of a request shares more rows than there are.")
        return found

    def write(self, header: StepRequest) -> None:
        """Say it in a request."""
        header.prefix_of.extend(self.of)
        header.prefix_rows.extend(self.rows)

    @property
    def num_rows(self) -> int:
        """M."""
        return sum(self.lengths) - sum(self.rows)

    def row_map(self, positions_N: Tensor) -> RowMap:
        """The map of rows; `ProtocolError` when shared rows stand at other positions."""
        source_N = np.empty(sum(self.lengths), dtype=np.int64)
        starts = np.cumsum((0, *self.lengths[:-1])).tolist()
        crossing, own = [], 0
        for start, length, of, rows in zip(starts, self.lengths, self.of, self.rows, strict=True):
            source_N[start : start + rows] = source_N[starts[of] : starts[of] + rows]
            source_N[start + rows : start + length] = np.arange(own, own + length - rows)
            crossing.append(np.arange(start + rows, start + length))
            own += length - rows
        found = RowMap(torch.from_numpy(np.concatenate(crossing)), torch.from_numpy(source_N))
        if not torch.equal(found.spread(found.pick(positions_N)), positions_N):
            raise ProtocolError("Rows that sequences of a request share stand at other positions.")
        return found
