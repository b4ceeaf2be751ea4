"""The split models of one process, lent to the clients that it plays.

A process may hold many clients (a simulation) or one (a hospital). Either way a client opens its own sealed
stream to the cloud, but a split model is built once per shape and lent: frozen weights are the same for all,
and a client's state is its adapter alone. So a hundred simulated clients cost one download and one copy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tightbeam.edge.cache.shortcut import FrozenParts
from tightbeam.edge.data import Example, Limits, load_examples
from tightbeam.edge.link.connection import Cloud
from tightbeam.edge.model.adapters import attach_adapter
from tightbeam.edge.modes.registry import MODES
from tightbeam.edge.recipe import AdapterSection, Codecs, SideSection
from tightbeam.edge.side import side_of
from tightbeam.federation.client.adapter import SplitAdapter

__all__ = ["AdapterShape", "Lender"]


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What decides which parameters a client trains, and of which size."""

    cut: str
    mode: str  # as in a recipe
    r: int
    scale: float  # alpha / r
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    side: SideSection | None = None  # of a mode that has one

    def section(self) -> AdapterSection:
        """Describe the adapter as a recipe does."""
        targets: Any = self.target_modules  # a tuple here, so that shapes can be keys
        return AdapterSection(
            r=self.r,
            alpha=self.scale * self.r,
            dropout=self.dropout,
            target_modules="all-linear" if targets == "all-linear" else list(targets),
        )

    @property
    def only_top(self) -> bool:
        """Whether the bottom has no adapter."""
        return not MODES[self.mode].adapts_bottom(self.side or SideSection())


class Lender:
    """One split model per shape, all on the same frozen weights."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, AdapterShape], SplitAdapter] = {}
        self._weights: dict[tuple[str, str], Tensor] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._examples: dict[tuple[str, Path, int, bool], list[Example]] = {}

    def tokenizer(self, cloud: Cloud) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, read once."""
        key = cloud.card.fingerprint
        if key not in self._tokenizers:
            self._tokenizers[key] = cloud.load_tokenizer()
        return self._tokenizers[key]

    def examples(self, cloud: Cloud, path: Path, *, max_length: int, answer_only: bool) -> list[Example]:
        """A client's file, read and tokenised once. Raises `DataError`."""
        key = cloud.card.fingerprint, path, max_length, answer_only
        if key not in self._examples:
            examples = load_examples(
                path, self.tokenizer(cloud), max_length=max_length, answer_only=answer_only
            )
            Limits.of(cloud.card).check(path, examples)
            self._examples[key] = examples
        return self._examples[key]

    def lend(self, cloud: Cloud, shape: AdapterShape, codec: str | Codecs) -> SplitAdapter:
        """A model of this shape whose steps go through `cloud`; take it back by lending it again.

        Raises what `Cloud.load_model`, `attach_adapter` and `ModeSpec.extend` raise.
        """
        key = cloud.card.fingerprint, shape
        if key not in self._models:
            self._models[key] = self._build(cloud, shape)
        lent = self._models[key]
        lent.trunk.stepper = cloud.open_steps(shape.cut, codec=codec, dtype=lent.model.dtype)
        if (side := side_of(lent.model)) is not None:
            lent.trunk.stepper.taps = side.plan.asked()
        return lent

    def _build(self, cloud: Cloud, shape: AdapterShape) -> SplitAdapter:
        model = cloud.load_model(shape.cut)
        for name, parameter in model.named_parameters():
            shared = self._weights.setdefault((cloud.card.fingerprint, name), parameter.data)
            parameter.data = shared
        blocks = FrozenParts.of(model).top if shape.only_top else None
        adapted = attach_adapter(model, shape.section(), blocks)
        MODES[shape.mode].extend(adapted, cloud.card, shape.side or SideSection())
        return SplitAdapter(adapted)
