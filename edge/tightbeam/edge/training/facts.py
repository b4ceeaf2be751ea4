"""What decides the numbers of a run, by content: a checkpoint keeps it, a resumed run must have the same."""

import hashlib
import json

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tightbeam.edge.recipe import Recipe
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["run_facts"]


def run_facts(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
    card: Card | None,
) -> dict[str, str]:
    """By name, for the message that tells what has changed; examples are told by `Splits.facts`."""
    return {
        "recipe": recipe.numbers_sha256()[:16],
        "backbone": fingerprint[:16],
        "cloud's dtype": "none" if card is None else card.dtype,
        "edge's dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": _digest(tokenizer.get_vocab()),
        "chat template": _digest(tokenizer.chat_template),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
