"""A model to train, as whoever fetched it hands it to a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tightbeam.edge.link.offer import cost_facts
from tightbeam.edge.recipe import Recipe
from tightbeam.edge.side import side_of
from tightbeam.edge.training.loop import StepObserver
from tightbeam.edge.training.progress import Notices
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["LoadedModel"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model to train, and what the ledger should say about where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    close: Callable[[], None]
    steps: StepObserver | None = None
    name: str = ""
    fingerprint: str = ""
    run: str = ""  # the run's name on the wire; the recipe's output.name when empty
    notices: Notices = field(default_factory=lambda: Notices(Console(stderr=True)))
    ledger_rows: Sequence[dict[str, Any]] = ()  # what loading itself cost: "transfer" rows
    card: Card | None = None  # of the cloud; mode side builds its network after it
    cache_secret: bytes | None = None  # seals the cache of activations; None for an edge without identity

    def facts(self, recipe: Recipe, model: PeftModel) -> dict[str, Any]:
        """What the ledger says of this start: which model, at which prices."""
        side = side_of(model)
        return {
            "run": self.run or recipe.output.name,
            "model": self.name,
            "fingerprint": self.fingerprint,
            "cut": recipe.cut,
            "codec": recipe.codec.model_dump(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "mode": recipe.mode,
            "hidden_size": int(self.model.config.get_text_config().hidden_size),
            **({} if self.card is None else cost_facts(self.card, recipe.cut)),
            **({} if side is None else {"num_taps": len(side.plan.taps), "tap_size": side.plan.tap_size}),
        }
