"""The split model equals PEFT on the whole model: every family, padding left, right and none, batch 1 and 5.

Over real gRPC on loopback, the cloud on a thread of this process; float32, codec fp32, CPU.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.clouds import CloudProcess
from support.comparing import GRADIENT_TOLERANCE, LOSS_TOLERANCE, Difference, compare, greedy, lora, twins
from support.in_process import InProcessCloud
from support.tiny import TINY, ragged_batch, tiny_model
from tightbeam.edge import connect


def _assert_exact(difference: Difference) -> None:
    assert difference.loss <= LOSS_TOLERANCE
    assert difference.gradient <= GRADIENT_TOLERANCE
    assert difference.num_gradients > 0


def _batch(padding: str, size: int) -> dict[str, Tensor]:
    if padding != "none":
        return ragged_batch(size, 12, side=padding)
    ids = torch.randint(3, 97, (size, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}  # no mask at all


@pytest.mark.parametrize("family", TINY)
def test_loss_and_gradients_equal_the_whole_model(
    tiny_cloud: Callable[[str], InProcessCloud], record_property: Callable[[str, object], None], family: str
) -> None:
    with connect(tiny_cloud(family).address, insecure=True) as cloud:
        split, whole = twins(cloud.load_model("1:2"), tiny_model(family), lora(family))
        for padding in ("left", "right", "none"):
            for size in (1, 5):
                difference = compare(split, whole, _batch(padding, size))
                record_property(f"{padding} {size}", str(difference))
                _assert_exact(difference)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("mistral", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen3", {"num_key_value_heads": 1}),
        ("gemma2", {"num_key_value_heads": 1, "attn_logit_softcapping": 5.0}),
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_variants_within_a_family(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    whole = tiny_model(family, **changes)
    whole.save_pretrained(tmp_path / "model")
    with InProcessCloud(tmp_path / "model", tmp_path / "cloud") as cloud:
        split = cloud.load_model(cloud.stepper("variants"))
        here, there = twins(split, whole, lora(family))
        for side in ("left", "right"):
            _assert_exact(compare(here, there, ragged_batch(5, 12, side=side)))


@pytest.mark.parametrize("cut", ["1:1", "2:1", "3:2"])
def test_every_cut_gives_the_same(tiny_cloud: Callable[[str], InProcessCloud], cut: str) -> None:
    """Several models in one connection share a run: none of their steps meets another's key."""
    bottom, top = (int(part) for part in cut.split(":"))
    blocks = (*range(bottom), *range(6 - top, 6))
    with connect(tiny_cloud("llama").address, insecure=True) as cloud:
        for _ in range(2):
            split, whole = twins(cloud.load_model(cut), tiny_model("llama"), lora("llama", blocks))
            _assert_exact(compare(split, whole, ragged_batch(3, 10, side="right")))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_packed_sequences_without_a_mask(tiny_cloud: Callable[[str], InProcessCloud], family: str) -> None:
    """Padding-free batches: positions that restart mean several sequences in one row."""
    ids = torch.randint(3, 97, (1, 14), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in (5, 7, 2)])[None]
    labels = ids.masked_fill(positions == 0, -100)
    # transformers looks for restarts only without a cache, which the split model never has
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}
    with connect(tiny_cloud(family).address, insecure=True) as cloud:
        split, whole = twins(cloud.load_model("1:2"), tiny_model(family), lora(family))
        _assert_exact(compare(split, whole, batch))
        joined = batch | {"position_ids": torch.arange(14)[None]}
        assert abs(float((whole(**joined).loss - whole(**batch).loss).detach())) > 1e-3  # the borders matter


@pytest.mark.parametrize("family", TINY)
def test_greedy_text_equals_the_whole_model(tiny_cloud: Callable[[str], InProcessCloud], family: str) -> None:
    prompts = ragged_batch(3, 8, side="left", seed=3)
    del prompts["labels"]
    with connect(tiny_cloud(family).address, insecure=True) as cloud:
        split = cloud.load_model("1:2")
        here = greedy(split, prompts, 6)
        assert torch.equal(here, greedy(tiny_model(family), prompts, 6))
        assert here.shape == (3, 14)


def test_a_cloud_in_its_own_process(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with (
        CloudProcess(tiny_folder("llama"), tmp_path) as process,
        connect(process.address, insecure=True) as cloud,
    ):
        split, whole = twins(cloud.load_model("1:2"), tiny_model("llama"), lora("llama"))
        for side in ("left", "right"):
            _assert_exact(compare(split, whole, ragged_batch(5, 12, side=side)))


_TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome. Both are old cities on rivers.",
    "A stream carries records in both directions until one side ends it.",
    "Hospitals keep their data.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "Once upon a time there was a small model that wanted to learn a new language, word by word.",
]


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("side", ["left", "right"])
def test_smollm2(
    smollm2: Path, tmp_path: Path, record_property: Callable[[str, object], None], side: str
) -> None:
    """On texts that the model knows: on random tokens its gradients are ill-conditioned.

    There, the whole model in float32 is 2e-3 away from itself in float64; on texts it is 7e-6.
    """
    whole = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side=side)
    batch = dict(tokenizer(_TEXTS, padding=True, return_tensors="pt"))
    before = torch.nn.functional.pad(batch["attention_mask"][:, :-1], (1, 0), value=1)
    hidden = (batch["attention_mask"] == 0) | (before == 0)
    batch["labels"] = batch["input_ids"].masked_fill(hidden, -100)
    with InProcessCloud(smollm2, tmp_path / "cloud", cut_policy="min_bottom=4,min_top=4") as cloud:
        split = cloud.load_model(cloud.stepper("smollm2", "4:4"), "4:4")
        here, there = twins(split, whole, lora("llama", (*range(4), *range(26, 30)), r=16))
        exact = copy.deepcopy(there).double()
        difference = compare(here, there, batch)
        record_property("split against whole", str(difference))
        _assert_exact(difference)
        assert (
            difference.gradient < compare(there, exact, batch).gradient
        )  # less than the model's own rounding
