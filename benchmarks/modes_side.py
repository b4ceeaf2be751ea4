"""Mode `side` in one process, for modes.py: the edge's ladder, and the bottom's change around the trunk.

What the frozen backbone answers is computed once per training text, as an edge fetches it once. B = batch,
T = tokens of the longest text, N = tokens, D = hidden size.
"""

import argparse

import torch
from benchmarks.modes_job import BATCH, Job, Mode, recode_rows
from benchmarks.modes_ladder import start_from_backbone
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tightbeam.common.backbone import Projection, Segments, SegmentTable
from tightbeam.edge.side import Ladder, choose_taps

WIDTH, HEADS = 192, 4  # the edge's own defaults


class SideJob(Job):
    """Top and bottom blocks with adapters, and a ladder unless the mode has no taps."""

    def __init__(self, arguments: argparse.Namespace, mode: Mode, seed: int) -> None:
        self._caught: dict[int, Tensor] = {}
        self._known: dict[int, tuple[Tensor, ...]] = {}  # what crossed of a training text
        super().__init__(arguments, mode, seed)
        blocks = list(self.inner.layers)
        self.below_top = nn.ModuleList(blocks[: self.top.start])
        self.at_edge = nn.ModuleList([*blocks[: self.bottom.stop], *blocks[self.top.start :]])
        self.tap_size, self.ladder = 0, None
        if self.tapped:
            self.projection = Projection.from_file(arguments.projection).to(self.device)
            self.tap_size = self.projection.size
            torch.manual_seed(seed)
            width = self.model.config.hidden_size
            self.ladder = Ladder(width, self.tapped, self.tap_size, WIDTH, HEADS).to(self.device)
            if mode.from_backbone:
                self._start_ladder(self.ladder)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters and the ladder."""
        return super().parameters() + ([] if self.ladder is None else list(self.ladder.parameters()))

    def hidden(self, input_ids_BT: Tensor, keep_BT: Tensor, rows: list[int] | None) -> Tensor:
        """First what crosses, from the bare backbone; then the edge's blocks, with the answer in between."""
        self.up.keep_BT = self.keep_BT = keep_BT
        self.frozen = self._frozen(input_ids_BT, keep_BT, rows)
        self.inner.layers = self.at_edge
        hidden_BTD: Tensor = self.inner(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD

    def _frozen(self, input_ids_BT: Tensor, keep_BT: Tensor, rows: list[int] | None) -> tuple[Tensor, ...]:
        """The bare backbone's cut activations, answer and taps, `[N, ...]`, as the edge knows them."""
        if rows is None:
            return self._cross_once(input_ids_BT, keep_BT)
        if any(row not in self._known for row in rows):
            crossed = self._cross_once(input_ids_BT, keep_BT)
            texts = zip(*(tensor.split(keep_BT.sum(1).tolist()) for tensor in crossed), strict=True)
            self._known |= dict(zip(rows, texts, strict=True))
        return tuple(map(torch.cat, zip(*(self._known[row] for row in rows), strict=True)))

    def _cross_once(self, input_ids_BT: Tensor, keep_BT: Tensor) -> tuple[Tensor, ...]:
        states, name = self._states(input_ids_BT, keep_BT), self.mode.activations
        taps = [recode_rows(self.projection(block, states[block]), name) for block in self.tapped]
        return states[self.bottom.stop - 1], recode_rows(states[self.top.start - 1], name), *taps

    def _states(self, input_ids_BT: Tensor, keep_BT: Tensor) -> dict[int, Tensor]:
        """Hidden states `[N, D]` of the bare backbone, after each block that is asked for."""
        self.inner.layers = self.below_top
        with torch.no_grad(), self.model.disable_adapter():
            self.inner(input_ids=input_ids_BT, use_cache=False)
        return {block: states_BTD[keep_BT] for block, states_BTD in self._caught.items()}

    def _start_ladder(self, ladder: Ladder) -> None:
        ids = [torch.tensor(text, device=self.device) for text, _ in self.train[: 2 * BATCH]]
        keep_BT = pad_sequence([torch.ones_like(each, dtype=torch.bool) for each in ids], batch_first=True)
        self.up.keep_BT = keep_BT
        with torch.autocast(self.device.type, torch.bfloat16):
            states = self._states(pad_sequence(ids, batch_first=True), keep_BT)
        below, above = self.at_edge[: self.bottom.stop], self.at_edge[self.bottom.stop :]
        half = len(self.tapped) // 2
        sources = [*_spread(below, half), *_spread(above[:-1], len(self.tapped) - half)]
        start_from_backbone(ladder, sources, states, self.bottom.stop - 1, self.projection, _table(keep_BT))

    def _cross(self, blocks: nn.ModuleList) -> None:
        trunk = range(self.bottom.stop, self.top.start)
        self.tapped = choose_taps(trunk, self.mode.taps) if self.mode.taps else ()
        for index in {trunk.start - 1, trunk.stop - 1, *self.tapped}:
            blocks[index].register_forward_hook(lambda _, __, out, i=index: self._caught.update({i: out}))
        blocks[trunk.start].register_forward_pre_hook(lambda _, args: (self.up(args[0]), *args[1:]))
        blocks[trunk.stop].register_forward_pre_hook(lambda _, args: (self._around(args[0]), *args[1:]))

    def _around(self, adapted_BTD: Tensor) -> Tensor:
        """Input of the top: the trunk's answer, the bottom's change and the ladder's."""
        keep_BT, (cut_ND, answer_ND, *taps_NP) = self.keep_BT, self.frozen
        adapted_ND = adapted_BTD[keep_BT]
        out_ND = answer_ND + (adapted_ND - cut_ND)
        if self.ladder is not None:
            out_ND = out_ND + self.ladder(adapted_ND, taps_NP, _table(keep_BT))
        out_BTD = torch.zeros_like(adapted_BTD)
        out_BTD[keep_BT] = out_ND.to(out_BTD.dtype)
        return out_BTD


def _table(keep_BT: Tensor) -> SegmentTable:
    lengths = keep_BT.sum(1).tolist()
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    return SegmentTable(Segments(tuple(lengths), positions_N), keep_BT.device)


def _spread(blocks: nn.ModuleList, count: int) -> list[nn.Module]:
    """`count` blocks from the first to the last."""
    return [blocks[round(place * (len(blocks) - 1) / max(count - 1, 1))] for place in range(count)]
