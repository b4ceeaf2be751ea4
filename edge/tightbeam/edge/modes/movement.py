"""How far the cut activations have moved since the start, on a probe that costs no crossing.

The distance of a token's cut activation from the backbone's own, relative to its length, is taken for a fixed
probe of training examples; the median over tokens leaves out the first tokens, whose norm is a hundred times
the others'. `settling.py` decides from it when to freeze. N = tokens, D = hidden size.
"""

import torch
from torch import Tensor

from tightbeam.edge.cache.shortcut import FrozenParts, bottom_output
from tightbeam.edge.modes.base import Job
from tightbeam.edge.modes.settling import PROBE_TOKENS, Settling

__all__ = ["Movement"]


class Movement:
    """Watches one run's bottom."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rule = Settling(job.plan.steps_per_epoch)

    def says_freeze(self, step: int) -> bool:
        """Whether to freeze before optimizer step `step`."""
        return self.rule.says_freeze(step, self.distance)

    @torch.no_grad()
    def distance(self) -> float:
        """Median over the probe's tokens of the relative distance from the backbone's own activations."""
        model = self.job.model
        training = model.training
        model.eval()
        now_ND = self._probe()
        with model.disable_adapter():
            start_ND = self._probe()
        model.train(training)
        return float(((now_ND - start_ND).norm(dim=1) / start_ND.norm(dim=1)).median())

    def _probe(self) -> Tensor:
        parts = FrozenParts.of(self.job.model.get_base_model())
        hidden: list[Tensor] = []
        for example in self.job.train:  # one by one, so that there is no padding to leave out
            ids_1N = torch.tensor([example.input_ids], device=parts.device)
            hidden.append(bottom_output(parts, input_ids=ids_1N)[0].float())
            if sum(map(len, hidden)) >= PROBE_TOKENS:
                break
        return torch.cat(hidden)
