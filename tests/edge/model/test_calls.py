"""What people do with a model beyond a forward and a backward: right, or refused with the way that works."""

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from support.comparing import GRADIENT_TOLERANCE, LOSS_TOLERANCE, Difference, compare, lora, twins
from support.edge_runs import byte_tokenizer
from support.in_process import InProcessCloud
from support.tiny import TINY, ragged_batch, tiny_model
from tightbeam.common.errors import DataError, UsageError
from tightbeam.edge import Cloud, connect

Clouds = Callable[[str], InProcessCloud]


@pytest.fixture
def llama(tiny_cloud: Clouds) -> Iterator[Cloud]:
    with connect(tiny_cloud("llama").address, insecure=True) as cloud:
        yield cloud


def _assert_exact(difference: Difference) -> None:
    assert difference.loss <= LOSS_TOLERANCE
    assert difference.gradient <= GRADIENT_TOLERANCE


def _padded(side: str, **changes: Tensor) -> dict[str, Tensor]:
    batch = ragged_batch(3, 9, side=side)
    return batch | {"labels": batch["input_ids"].clone()} | changes


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_at_padding_are_refused(llama: Cloud, side: str) -> None:
    """As `labels = input_ids` makes them, with PEFT or without, shifted by the caller or not."""
    split: Any = llama.load_model("1:2")
    batch = _padded(side)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    with pytest.raises(DataError, match=r"label at token \d+ of row 1.*Pad on the right.*-100"):
        split(**batch)
    with pytest.raises(DataError, match="label at token"):
        split(**(batch | {"shift_labels": shifted}))
    adapted, _ = twins(split, tiny_model("llama"), lora("llama"))
    with pytest.raises(DataError, match="label at token"):
        adapted(**batch)


def test_labels_at_padding_without_a_mask_are_text(llama: Cloud) -> None:
    batch = _padded("right")
    del batch["attention_mask"]
    _assert_exact(compare(*twins(llama.load_model("1:2"), tiny_model("llama"), lora("llama")), batch))


def test_a_label_at_the_first_padding_is_learned(llama: Cloud) -> None:
    """A real token predicts it: how a text ends, where padding is the end of text."""
    batch = ragged_batch(3, 9, side="right")
    ends = batch["attention_mask"][1:].sum(1)
    batch["labels"][torch.arange(1, 3), ends] = 2
    _assert_exact(compare(*twins(llama.load_model("1:2"), tiny_model("llama"), lora("llama")), batch))


@pytest.mark.parametrize("family", TINY)
def test_the_collator_of_transformers(tiny_cloud: Clouds, family: str) -> None:
    """Padding on the right is the whole model's, on the left it has a label that nothing predicts."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [{"input_ids": torch.randint(5, 97, (n,)).tolist()} for n in (9, 4)]
    with connect(tiny_cloud(family).address, insecure=True) as cloud:
        split, whole = twins(cloud.load_model("1:2"), tiny_model(family), lora(family))
        for tokenizer.padding_side in ("right", "left"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                batch = {name: collate(rows)[name] for name in ("input_ids", "attention_mask", "labels")}
            assert not batch["attention_mask"].all()
            if tokenizer.padding_side == "right":
                _assert_exact(compare(split, whole, batch))
            else:
                with pytest.raises(DataError, match="label at token"):
                    split(**batch)


def test_several_threads_share_one_model(llama: Cloud) -> None:
    model: Any = llama.load_model("1:2")

    def loss(batch: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(model(**batch).loss)

    batches = [ragged_batch(3, 8 + seed % 5, side="right", seed=seed) for seed in range(32)]
    alone = [loss(batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(loss, batches)) == alone


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_of_the_trunk_are_refused(tiny_cloud: Clouds, family: str, name: str) -> None:
    """A list with some of them would be read at the wrong places."""
    batch: Any = ragged_batch(2, 8, side="right")
    with connect(tiny_cloud(family).address, insecure=True) as cloud:
        model: Any = cloud.load_model("1:2")
        with pytest.raises(UsageError, match=f"{name} cannot be had"):
            model(**batch, **{name: True})
        model(**batch, **{name: False})
        model.set_attn_implementation("eager")  # else the config refuses attentions by itself
        setattr(model.config, name, True)
        with pytest.raises(UsageError, match=f"{name} cannot be had"):
            model(**batch)


@pytest.mark.parametrize("packed", [True, False])
def test_packing_where_the_models_own_blocks_do_not_part_sequences(tiny_cloud: Clouds, packed: bool) -> None:
    """OPT's attend across; in the other families see tests/exactness/test_families.py."""
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None] if packed else torch.arange(12)[None]
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids, "use_cache": False}
    with connect(tiny_cloud("opt").address, insecure=True) as cloud:
        split, whole = twins(cloud.load_model("1:2"), tiny_model("opt"), lora("opt"))
        if not packed:
            _assert_exact(compare(split, whole, batch))
            return
        with pytest.raises(UsageError, match=r"let them see each other.*Pad them"):
            split(**batch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow  # tracing takes long
def test_a_compiled_model(llama: Cloud) -> None:
    """The second call is the one that counts: it has another length than the one that was traced."""
    model: Any = llama.load_model("1:1")
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        found = [float(compiled(**ragged_batch(3, length, side="right")).loss) for length in (11, 8)]
        expected = [float(model(**ragged_batch(3, length, side="right")).loss) for length in (11, 8)]
    torch.compiler.reset()
    assert found == pytest.approx(expected, abs=LOSS_TOLERANCE)


def test_a_copied_model_makes_its_steps_over_the_same_connection(llama: Cloud) -> None:
    """As TRL's reference models are made."""
    split, whole = twins(llama.load_model("1:2"), tiny_model("llama"), lora("llama"))
    copied, batch = copy.deepcopy(split), ragged_batch(3, 9, side="right")
    _assert_exact(compare(copied, whole, batch))
    with torch.no_grad():
        next(p for p in copied.parameters() if p.requires_grad).add_(1.0)
        assert float(copied(**batch).loss) != float(split(**batch).loss)
    _assert_exact(compare(split, whole, batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_dtype(llama: Cloud, dtype: torch.dtype) -> None:
    """Converted after loading: the edge's blocks compute in it, and what crosses has 32 bits at most."""
    split, whole = twins(llama.load_model("1:2"), tiny_model("llama"), lora("llama"))
    here: Any = split.to(dtype)
    loss = here(**ragged_batch(3, 9, side="right")).loss
    loss.backward()
    assert {p.grad.dtype for p in here.parameters() if p.grad is not None} == {dtype}
    reference = float(whole(**ragged_batch(3, 9, side="right")).loss.detach())
    assert abs(float(loss.detach()) - reference) < (1e-6 if dtype is torch.float64 else 1e-2)


def test_generating_from_embeddings_names_the_way_that_works(llama: Cloud) -> None:
    model: Any = llama.load_model("1:2")
    embeddings = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with pytest.raises(UsageError, match=r"generate\(input_ids, use_cache=False\): from inputs_embeds"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=3)
