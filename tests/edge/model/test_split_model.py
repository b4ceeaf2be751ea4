"""The split model starts as `from_pretrained` starts the whole one, and disturbs no other thread by it."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from support.comparing import LOSS_TOLERANCE
from support.in_process import InProcessCloud
from support.tiny import ragged_batch, tiny_model
from tightbeam.common.backbone import build_skeleton, config_from_dict
from tightbeam.common.errors import UnsupportedModelError
from tightbeam.edge import connect


def _both(
    folder: Path, tmp_path: Path, local_path: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    with (
        InProcessCloud(folder, tmp_path / "cloud") as served,
        connect(served.listen(), insecure=True) as cloud,
    ):
        split: Any = cloud.load_model("1:2", local_path=local_path)
        whole: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        batch = ragged_batch(3, 9, side="right")
        with torch.no_grad():
            assert abs(float(split(**batch).loss - whole(**batch).loss)) <= LOSS_TOLERANCE
        prompts: Any = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
        torch.manual_seed(0)
        here = split.generate(**prompts, max_new_tokens=20)
        torch.manual_seed(0)
        assert torch.equal(here, whole.generate(**prompts, max_new_tokens=20))
        return split, whole


@pytest.mark.parametrize("from_disk", [False, True])
def test_it_generates_as_its_makers_say(tmp_path: Path, from_disk: bool) -> None:
    """Several ends, a penalty and sampling, which only generation_config.json knows."""
    model, folder = tiny_model("llama"), tmp_path / "model"
    model.save_pretrained(folder)
    wanted = {"eos_token_id": [11, 12, 13, 14, 2], "repetition_penalty": 1.7, "do_sample": True, "top_k": 30}
    wanted |= {"temperature": 1.3, "cache_implementation": "static", "pad_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(wanted))
    split, _ = _both(folder, tmp_path, folder if from_disk else None)
    kept: Any = split.generation_config
    assert (kept.eos_token_id, kept.use_cache) == (wanted["eos_token_id"], False)


@pytest.mark.parametrize("content", ["{", "[1]", '"x"'])
def test_a_generation_config_that_is_none(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json cannot be used"):
        _both(folder, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stored", ["another", "the same", "head only"])
def test_a_head_that_is_stored_beside_a_tied_embedding(tmp_path: Path, family: str, stored: str) -> None:
    """Transformers ties what is equal or missing, and keeps apart what differs."""
    model, folder = tiny_model(family, tie_word_embeddings=True), tmp_path / "model"
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = safetensors.torch.load_file(file)
    embedding = next(name for name in state if name.endswith(("embed_tokens.weight", "wte.weight")))
    state["lm_head.weight"] = state[embedding] * (-0.5 if stored == "another" else 1.0)
    if stored == "head only":
        del state[embedding]
    safetensors.torch.save_file(state, file, {"format": "pt"})
    split, _ = _both(folder, tmp_path)
    head, tokens = split.get_output_embeddings(), split.get_input_embeddings()
    assert head is not None
    assert (head.weight is tokens.weight) == (stored != "another")


def test_a_load_changes_nothing_for_other_threads(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_from_dict(json.loads((tiny_folder("llama") / "config.json").read_text()))
    seen: list[nn.Linear] = []
    built: Any = LlamaForCausalLM.post_init

    def post_init(model: LlamaForCausalLM) -> None:
        other = threading.Thread(target=lambda: seen.append(nn.Linear(2, 2)))
        other.start()
        other.join()
        built(model)

    monkeypatch.setattr(LlamaForCausalLM, "post_init", post_init)
    skeleton = build_skeleton(config, torch.bfloat16)
    assert [(layer.weight.dtype, layer.weight.device.type) for layer in seen] == [(torch.float32, "cpu")]
    assert {(p.dtype, p.device.type) for p in skeleton.parameters()} == {(torch.bfloat16, "meta")}
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
