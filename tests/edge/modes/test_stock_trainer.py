"""A stock `transformers.Trainer` on models of modes `top` and `side`: it trains, generates, saves and loads.

Mode `top` from Python is a cache behind the trunk: the Trainer's second epoch asks the cloud for nothing.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from support.in_process import InProcessCloud
from support.tiny import ragged_batch
from tightbeam.common.accounts.rows import StepRow
from tightbeam.edge.cache import ActivationCache
from tightbeam.edge.cache.shortcut import FrozenParts, TrunkShortcut
from tightbeam.edge.side import add_side, load_side, save_side

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PROMPT = torch.arange(60, 66)[None]
GENERATE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@dataclass
class Edge:
    """A split model of a mode, and what crossed for it."""

    model: peft.PeftModel
    rows: list[StepRow]


def fresh(cloud: InProcessCloud, layers: list[int], saved: Path | None = None) -> Edge:
    """A split model with a new adapter, or with a saved one."""
    rows: list[StepRow] = []
    base = cloud.load_model(cloud.stepper(f"run-{uuid.uuid4().hex}", "2:2", on_row=rows.append), "2:2")
    if saved is not None:
        return Edge(peft.PeftModel.from_pretrained(base, saved, is_trainable=True), rows)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=layers)
    model = peft.get_peft_model(base, config)
    assert isinstance(model, peft.PeftModel)
    return Edge(model, rows)


@contextmanager
def top(cloud: InProcessCloud, folder: Path, saved: Path | None = None) -> Iterator[Edge]:
    edge = fresh(cloud, [4, 5], saved)
    base = edge.model.get_base_model()
    parts = FrozenParts.of(base)
    scope = parts.scope(cloud.backbone.fingerprint, "2:2", "", base.dtype, 16)
    with ActivationCache(folder, scope, secret=b"s", max_bytes=10**8, warn=pytest.fail) as cache:
        TrunkShortcut(parts, cache, base.dtype, 16)
        yield edge


@contextmanager
def side(cloud: InProcessCloud, folder: Path, saved: Path | None = None) -> Iterator[Edge]:
    edge = fresh(cloud, [0, 1, 4, 5], saved)
    if saved is None:
        add_side(edge.model, cloud.card, taps=2, width=16, heads=2)
    else:
        load_side(saved, edge.model, cloud.card)
    yield edge


BUILDERS: dict[str, Callable[..., Any]] = {"top": top, "side": side}


def train(model: peft.PeftModel, folder: Path, epochs: int) -> None:
    rows = ragged_batch(8, 10, side="right", vocab=261)
    data = Dataset.from_dict({name: column.tolist() for name, column in rows.items()})
    arguments = TrainingArguments(
        str(folder), use_cpu=True, num_train_epochs=epochs, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=5, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()


@pytest.mark.parametrize("mode", BUILDERS)
def test_it_trains_generates_saves_and_loads(cloud: InProcessCloud, tmp_path: Path, mode: str) -> None:
    given, mask = ragged_batch(8, 10, side="right", vocab=261), torch.ones_like(PROMPT)
    with BUILDERS[mode](cloud, tmp_path / "cache") as edge, torch.no_grad():
        before = edge.model.eval()(**given)
        with torch.enable_grad():
            train(edge.model, tmp_path / "trainer", epochs=12)
        after = edge.model.eval()(**given)
        assert after.loss.item() < before.loss.item() - 0.03
        written = edge.model.generate(input_ids=PROMPT, attention_mask=mask, **GENERATE)
        assert written.shape == (1, 10)
        follows = edge.model(input_ids=written[:, :-1]).logits[0, 5:].argmax(-1)
        assert torch.equal(written[0, 6:], follows)
        edge.model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
        if mode == "side":
            save_side(tmp_path / "saved", edge.model)
        assert {row.kind for row in edge.rows} == {"forward"}  # no gradient crossed
    with BUILDERS[mode](cloud, tmp_path / "another", tmp_path / "saved") as again, torch.no_grad():
        loaded = again.model.eval()(**given)
        assert torch.equal(loaded.logits, after.logits)
        assert not torch.equal(loaded.logits, before.logits)
        assert torch.equal(again.model.generate(input_ids=PROMPT, attention_mask=mask, **GENERATE), written)


def test_later_epochs_of_top_ask_for_nothing(cloud: InProcessCloud, tmp_path: Path) -> None:
    crossed = []
    for epochs in (1, 3):
        with top(cloud, tmp_path / f"cache-{epochs}") as edge:
            train(edge.model, tmp_path / "trainer", epochs)
            crossed.append([row.segments for row in edge.rows])
    assert crossed == [[4, 4], [4, 4]]
    with top(cloud, tmp_path / "cache-3") as edge:  # and another process on the same cache neither
        train(edge.model, tmp_path / "trainer", 1)
        assert edge.rows == []


def test_top_opens_on_the_whole_model_and_side_alone_does_not(
    cloud: InProcessCloud, folder: Path, tmp_path: Path
) -> None:
    """What docs/modes.md says of the saved folders."""
    given = ragged_batch(4, 10, side="right", vocab=261)
    for mode, same in (("top", True), ("side", False)):
        with BUILDERS[mode](cloud, tmp_path / f"{mode}-cache") as edge:
            train(edge.model, tmp_path / "trainer", 6)
            with torch.no_grad():
                split = edge.model.eval()(**given).loss.item()
            edge.model.save_pretrained(tmp_path / mode, save_embedding_layers=False)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        whole = peft.PeftModel.from_pretrained(whole, tmp_path / mode).eval()
        with torch.no_grad():
            assert (abs(whole(**given).loss.item() - split) < 1e-5) == same
