"""Rotary embeddings that depend on the longest position of a batch: padding decides, and what came before.

The whole model chooses their frequencies by padded positions, which do not cross, and transformers' dynamic
NTK remembers its longest batch. Phi-3's longrope has two sets: for 16 positions here, and for more.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.comparing import GRADIENT_TOLERANCE, LOSS_TOLERANCE, compare, lora, twins
from support.in_process import InProcessCloud
from support.tiny import ragged_batch, tiny_model
from tightbeam.common.backbone import VaryingRope
from tightbeam.common.errors import StepTooLargeError, UsageError

_MODELS: dict[str, dict[str, Any]] = {
    "phi3": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0,
            "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 8.0],
        },
    },
    "llama": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=_MODELS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, InProcessCloud]]:
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    tiny_model(family, **_MODELS[family]).save_pretrained(folder / "model")
    with InProcessCloud(folder / "model", folder / "cloud") as cloud:
        yield family, cloud


def _padded(length: int, to: int, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """Sequences of at most `length` tokens, padded to `to`."""
    batch, room = ragged_batch(3, length, side=side, seed=seed), (0, to - length)
    fills = {"input_ids": 2, "attention_mask": 0, "labels": -100}
    return {name: torch.nn.functional.pad(batch[name], room, value=fill) for name, fill in fills.items()}


def test_every_batch_of_a_run_equals_the_whole_model(served: tuple[str, InProcessCloud]) -> None:
    """Short, padded beyond the limit, really longer, then around the limit again, which dynamic NTK feels."""
    family, cloud = served
    stepper = cloud.stepper("run", "2:1")
    split, whole = twins(
        cloud.load_model(stepper, "2:1"), tiny_model(family, **_MODELS[family]), lora(family, (0, 1, 5))
    )
    batches = [
        _padded(10, 10), _padded(10, 40), _padded(12, 20), _padded(40, 40), _padded(20, 20, "left"),
        _padded(16, 16), _padded(16, 17), _padded(9, 9), _padded(16, 16), _padded(16, 30),
    ]  # fmt: skip
    for number, batch in enumerate(batches):
        difference = compare(split, whole, batch)
        assert difference.loss <= LOSS_TOLERANCE, number
        assert difference.gradient <= GRADIENT_TOLERANCE, number


def test_what_one_edge_sends_changes_nothing_for_another(served: tuple[str, InProcessCloud]) -> None:
    _, cloud = served
    one, other = (cloud.load_model(cloud.stepper(f"tenant {n}")) for n in range(2))
    batch = _padded(16, 16)
    with torch.no_grad():
        before = one(**batch).logits
        other(**_padded(40, 40))
        assert torch.equal(one(**batch).logits, before)


def test_only_padding_that_decides_costs_a_row(served: tuple[str, InProcessCloud]) -> None:
    _, cloud = served
    tokens: list[int] = []
    stepper = cloud.stepper("rows", on_row=lambda row: tokens.append(row.tokens))
    model = cloud.load_model(stepper)
    with torch.no_grad():
        for batch in (_padded(10, 14), _padded(10, 40), _padded(40, 40)):
            model(**batch)
            tokens[-1] -= int(batch["attention_mask"].sum())
    assert tokens == [0, 1, 0]


def test_a_cached_trunk_cannot_follow(served: tuple[str, InProcessCloud]) -> None:
    _, cloud = served
    model: Any = cloud.load_model(cloud.stepper("cached"))

    class Shortcut:
        trains_below = False

        def answer(self, hidden_MD: Tensor, table: object) -> Tensor:
            return hidden_MD

    model.model.layers[1].shortcut = Shortcut()
    with torch.no_grad():
        model(**_padded(10, 16))
        with pytest.raises(UsageError, match=r"rotary embeddings of this model change.*max_length"):
            model(**_padded(10, 17))


def test_dynamic_ntk_has_a_limit_all_the_same(tmp_path: Path) -> None:
    tiny_model("llama", **_MODELS["llama"]).save_pretrained(tmp_path / "model")
    with InProcessCloud(tmp_path / "model", tmp_path / "cloud") as cloud:
        model: Any = cloud.load_model(cloud.stepper("limit"))
        with torch.no_grad():
            model(**_padded(64, 64))
            with pytest.raises(StepTooLargeError, match="beyond the 64"):
                model(**_padded(65, 65))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt2", "opt"])
def test_other_models_have_nothing_that_varies(family: str) -> None:
    assert VaryingRope(tiny_model(family)).longest(torch.tensor([[10**6]])) == 0
