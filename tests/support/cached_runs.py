"""Runs of the modes that cache, over a cloud in this process; everything that crosses is recorded."""

import csv
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from support.edge_runs import byte_tokenizer, quiet, tiny_llama, tiny_recipe
from support.in_process import InProcessCloud
from tightbeam.common.accounts.rows import StepRow
from tightbeam.edge.link.channel import Channel, Exchange
from tightbeam.edge.link.stepper import Stepper
from tightbeam.edge.recipe import Codecs, Recipe
from tightbeam.edge.training.folder import RunFolder
from tightbeam.edge.training.recipe_run import LoadedModel, TrainResult, train_recipe
from tightbeam.proto import backbone_pb2 as pb

__all__ = [
    "ALL",
    "A_BATCH",
    "A_SAMPLE",
    "CrashError",
    "Crossing",
    "cached_recipe",
    "losses",
    "save_model",
    "train_over",
]

A_SAMPLE, A_BATCH, ALL = 50, 110, 4096  # tokens of a step: room for one of the 23 texts, for three, for all


class CrashError(Exception):
    """What a test throws into a run in place of a power cut."""


def losses(run: RunFolder) -> list[str]:
    """Loss of every optimizer step, as it was written."""
    with run.metrics.open(encoding="utf-8", newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def save_model(folder: Path) -> PreTrainedModel:
    """A random Llama of six blocks, saved for a cloud to serve."""
    model = tiny_llama(num_hidden_layers=6)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def cached_recipe(folder: Path, **changes: Any) -> Recipe:
    """23 examples, 8 steps an epoch, three epochs of mode `top` at cut 2:2."""
    folder.mkdir(parents=True, exist_ok=True)
    train = {"steps": None, "epochs": 3, "checkpoint_every": 8} | changes.pop("train", {})
    return tiny_recipe(folder, **({"mode": "top", "cut": "2:2", "train": train} | changes))


@dataclass
class Crossing:
    """Everything that crossed: rows of the accounts, and plaintext messages before they are sealed."""

    rows: list[StepRow] = field(default_factory=list)
    messages: list[tuple[pb.StepRequest, list[Tensor]]] = field(default_factory=list)
    undrained: list[StepRow] = field(default_factory=list)
    said: str = ""

    def add(self, row: StepRow) -> None:
        """One finished step."""
        self.rows.append(row)
        self.undrained.append(row)

    def drain(self) -> Sequence[StepRow]:
        """What the training loop asks for."""
        rows, self.undrained = self.undrained, []
        return rows


class _Recorder:
    """A channel that notes what it is given to seal."""

    def __init__(self, inner: Channel, crossing: Crossing) -> None:
        self._inner, self._crossing = inner, crossing

    def submit(self, header: pb.StepRequest, payloads: list[Tensor]) -> Future[Exchange]:
        self._crossing.messages.append((header, list(payloads)))
        return self._inner.submit(header, payloads)

    def close(self) -> None:
        self._inner.close()


def train_over(
    cloud: InProcessCloud,
    recipe: Recipe,
    *,
    resume: bool = False,
    act: Callable[[int], None] = lambda rows: None,
    secret: bytes | None = b"s" * 32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    share_prefixes: bool = True,
    max_tokens_per_step: int = A_BATCH,
) -> tuple[TrainResult, Crossing]:
    """Train; `act` hears how many steps have crossed after each.

    A cache is filled in steps of as many batches as fit: with `max_tokens_per_step` at `A_BATCH` of one.
    """
    crossing = Crossing()

    def on_row(row: StepRow) -> None:
        crossing.add(row)
        act(len(crossing.rows))

    def load(recipe: Recipe) -> LoadedModel:
        run = f"run-{uuid.uuid4().hex}"  # a run name is used once
        names = {
            name: "fp32" if value == "auto" else value for name, value in recipe.codec.model_dump().items()
        }
        codecs = Codecs.model_validate(names)
        stepper = Stepper(
            run,
            lambda: _Recorder(cloud.open_channel(run, recipe.cut), crossing),
            codecs,
            trunk_dtype=cloud.card.dtype,
            max_tokens_per_step=max_tokens_per_step,
            share_prefixes=share_prefixes,
            on_row=on_row,
        )
        model = cloud.load_model(stepper, recipe.cut)
        return LoadedModel(
            model=model,
            tokenizer=tokenizer or byte_tokenizer(),
            close=stepper.close,
            steps=crossing,
            fingerprint=cloud.backbone.fingerprint,
            card=cloud.card,
            run=run,
            cache_secret=secret,
        )

    console, text = quiet()
    try:
        return train_recipe(recipe, load=load, resume=resume, console=console), crossing
    finally:
        crossing.said = text.getvalue()
