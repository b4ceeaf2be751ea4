"""Mode `side` in one process, for modes.py: the edge's ladder, and the bottom's change around the trunk.

The backbone's answer is computed anew in every step, where an edge reads it from its cache: the numbers are
the same, and so is what is trained. B = batch, T = tokens of the longest text, N = tokens, D = hidden size.
"""

import argparse

import torch
from benchmarks.modes_job import Job, Mode, recode_rows
from torch import Tensor, nn

from tightbeam.common.backbone import Projection, Segments, SegmentTable
from tightbeam.edge.side import Ladder, choose_taps

WIDTH, HEADS = 192, 4  # the edge's own defaults


class SideJob(Job):
    """Top and bottom blocks with adapters, and a ladder unless the mode has no taps."""

    def __init__(self, arguments: argparse.Namespace, mode: Mode, seed: int) -> None:
        self._caught: dict[int, Tensor] = {}
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

    def parameters(self) -> list[nn.Parameter]:
        """The adapters and the ladder."""
        return super().parameters() + ([] if self.ladder is None else list(self.ladder.parameters()))

    def hidden(self, input_ids_BT: Tensor, keep_BT: Tensor, rows: list[int] | None) -> Tensor:
        """First what crosses, from the bare backbone; then the edge's blocks, with the answer in between."""
        self.up.keep_BT = self.keep_BT = keep_BT
        self.inner.layers = self.below_top
        with torch.no_grad(), self.model.disable_adapter():
            self.inner(input_ids=input_ids_BT, use_cache=False)
        self.frozen = dict(self._caught)
        self.inner.layers = self.at_edge
        hidden_BTD: Tensor = self.inner(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD

    def _cross(self, blocks: nn.ModuleList) -> None:
        trunk = range(self.bottom.stop, self.top.start)
        self.tapped = choose_taps(trunk, self.mode.taps) if self.mode.taps else ()
        for index in {trunk.start - 1, trunk.stop - 1, *self.tapped}:
            blocks[index].register_forward_hook(lambda _, __, out, i=index: self._caught.update({i: out}))
        blocks[trunk.start].register_forward_pre_hook(lambda _, args: (self.up(args[0]), *args[1:]))
        blocks[trunk.stop].register_forward_pre_hook(lambda _, args: (self._around(args[0]), *args[1:]))

    def _around(self, adapted_BTD: Tensor) -> Tensor:
        """Input of the top: the trunk's answer, the bottom's change and the ladder's."""
        keep_BT, name = self.keep_BT, self.mode.activations
        answer_ND = recode_rows(self.frozen[self.top.start - 1][keep_BT], name)
        adapted_ND = adapted_BTD[keep_BT]
        out_ND = answer_ND + (adapted_ND - self.frozen[self.bottom.stop - 1][keep_BT])
        if self.ladder is not None:
            taps_NP = [
                recode_rows(self.projection(block, self.frozen[block][keep_BT]), name)
                for block in self.tapped
            ]
            lengths = keep_BT.sum(1).tolist()
            segments = Segments(tuple(lengths), torch.cat([torch.arange(length) for length in lengths]))
            out_ND = out_ND + self.ladder(adapted_ND, taps_NP, SegmentTable(segments, self.device))
        out_BTD = torch.zeros_like(adapted_BTD)
        out_BTD[keep_BT] = out_ND.to(out_BTD.dtype)
        return out_BTD
