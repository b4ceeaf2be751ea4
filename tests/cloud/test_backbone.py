"""Loading a backbone: only the trunk is in memory, all weights are on offer, refusals name their reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from support.in_process import InProcessCloud
from support.tiny import TINY, tiny_model
from tightbeam.cloud.backbone import Backbone, load_backbone
from tightbeam.common.backbone import CutPolicy, Segments, dissect, fingerprint
from tightbeam.common.errors import TightbeamError, UnsupportedModelError, UsageError


def _load(folder: Path, policy: str = "", dtype: str = "auto") -> Backbone:
    return load_backbone(str(folder), CutPolicy.parse(policy), device="cpu", dtype=dtype)


@pytest.mark.parametrize("family", TINY)
def test_only_the_trunk_is_loaded(tiny_folder: Callable[[str], Path], family: str) -> None:
    backbone = _load(tiny_folder(family), "min_bottom=2,min_top=1")
    loaded = [any(not p.is_meta for p in block.parameters()) for block in backbone.trunk.blocks]
    assert loaded == [False, False, True, True, True, False]
    embedding = backbone.trunk.model.get_submodule(dissect(tiny_model(family)).embedding_path)
    assert all(p.is_meta for p in embedding.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_blobs_are_the_checkpoint(tiny_folder: Callable[[str], Path], family: str) -> None:
    """Together they hold every tensor once, as valid safetensors; their hashes give the fingerprint."""
    backbone, state = _load(tiny_folder(family)), tiny_model(family).state_dict()
    found = {}
    for blob in backbone.blobs:
        data = b"".join(blob.read(0))
        assert len(data) == blob.num_bytes
        if not blob.name.startswith("file/"):
            found.update(safetensors.torch.load(data))
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name])
    # a tied head is the embedding, and is not sent twice
    assert state.keys() - found.keys() <= {"lm_head.weight"}
    names = {blob.name for blob in backbone.blobs if not blob.name.startswith("file/")}
    assert names >= {f"block.{i}" for i in range(6)} | {"embedding"}
    hashes = {blob.name: blob.sha256 for blob in backbone.blobs if blob.name in names}
    assert fingerprint(json.loads(backbone.config_json), hashes) == backbone.fingerprint


def test_reading_from_any_offset(tiny_folder: Callable[[str], Path]) -> None:
    for blob in _load(tiny_folder("llama")).blobs:
        whole = b"".join(blob.read(0))
        for offset in (0, 1, len(blob.header), len(whole) // 2, len(whole) - 1, len(whole)):
            assert b"".join(blob.read(offset)) == whole[offset:]


def test_a_changed_weight_or_config_changes_the_fingerprint(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    prints = {_load(tiny_folder("llama")).fingerprint}
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "same")
    assert _load(tmp_path / "same").fingerprint in prints
    with torch.no_grad():
        next(iter(model.parameters()))[5, 5] += 1e-6
    model.save_pretrained(tmp_path / "weight")
    tiny_model("llama", rms_norm_eps=1e-5).save_pretrained(tmp_path / "config")
    prints |= {_load(tmp_path / name).fingerprint for name in ("weight", "config")}
    assert len(prints) == 3


def test_a_base_model_without_head_prefix_is_served(tmp_path: Path) -> None:
    """Checkpoints of the base model lack the prefix that the causal model's names have."""
    model = tiny_model("llama")
    base_model: Any = model.base_model
    base_model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "whole")
    base, whole = _load(tmp_path / "base"), _load(tmp_path / "whole")
    segments = Segments((4,), torch.arange(4))
    hidden_ND = torch.randn(4, 32)
    outputs = [b.trunk.run(hidden_ND, segments, range(1, 4)) for b in (base, whole)]
    assert torch.equal(outputs[0], outputs[1])


def test_shards_and_other_dtypes(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    backbone = _load(tmp_path / "sharded")
    assert backbone.dtype == torch.bfloat16
    assert _load(tmp_path / "sharded", dtype="float32").dtype == torch.float32


def test_the_estimate_of_held_bytes_bounds_what_autograd_keeps(tiny_folder: Callable[[str], Path]) -> None:
    backbone, span = _load(tiny_folder("llama")), range(1, 4)
    segments = Segments((40, 25), torch.cat([torch.arange(40), torch.arange(25)]))
    weights = {p.data_ptr() for p in backbone.trunk.model.parameters() if not p.is_meta}
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out_ND = backbone.trunk.run(torch.randn(65, 32).requires_grad_(), segments, span)
    assert out_ND.requires_grad
    assert 0.7 * sum(seen.values()) <= backbone.graph_bytes(segments, span) <= 1.5 * sum(seen.values())


def _refused(folder: Path, error: type[TightbeamError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        _load(folder)
    assert caught.value.cure


def _config(folder: Path, **values: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    safetensors.torch.save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "bloom", "hidden_size": 32}, "'bloom' cannot be cut: its attention"),
        ({"model_type": "falcon", "hidden_size": 32}, "'falcon' cannot be cut: its attention"),
        ({"model_type": "mamba"}, "'mamba' cannot be cut: it has no attention"),
        ({"model_type": "t5"}, "'t5' is an encoder-decoder"),
        ({"model_type": "llamma"}, "does not know models of type 'llamma'"),
        ({}, "does not know models of type None"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "Quantised checkpoints"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_cut_are_refused_by_name(
    tmp_path: Path, values: dict[str, object], words: str
) -> None:
    _refused(_config(tmp_path / "model", **values), UnsupportedModelError, words)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    _refused(tmp_path, UsageError, "has no config.json")
    (tmp_path / "config.json").write_text("{not json")
    _refused(tmp_path, UsageError, "is not JSON")
    _refused(tmp_path / "missing", UsageError, "no folder .*missing")


def test_pickles_are_refused_with_the_cure(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    _refused(tmp_path, UnsupportedModelError, "holds no .safetensors")


@pytest.mark.parametrize("keep", [3, 8, 100, 0.3, 0.99])
def test_files_that_are_cut_short(tmp_path: Path, keep: float) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    _refused(tmp_path, UsageError, "cut short|not a safetensors file")


def test_a_lacking_weight_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    state = {name: t.clone() for name, t in model.state_dict().items() if "layers.3.mlp.up_proj" not in name}
    (file,) = tmp_path.glob("*.safetensors")
    safetensors.torch.save_file(state, file)
    _refused(tmp_path, UnsupportedModelError, "lacks 1 weights, first 'model.layers.3.mlp.up_proj.weight'")


def test_a_policy_without_a_trunk_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="leaves no trunk of 6 blocks"):
        _load(tiny_folder("llama"), "min_bottom=3,min_top=3")


def test_a_trunk_that_leaks_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test runs at load: a block that mixes all rows is caught, whatever its family claims."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    tiny_model("llama").save_pretrained(tmp_path / "model")
    plain: Any = LlamaMLP.forward

    def leaking(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = plain(self, x) + 1e-3 * x.mean(dim=1, keepdim=True)
        return mixed

    _load(tmp_path / "model")
    monkeypatch.setattr(LlamaMLP, "forward", leaking)
    _refused(tmp_path / "model", UnsupportedModelError, "leaks across|gives other results")


def test_the_card_tells_what_an_edge_needs(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with InProcessCloud(tiny_folder("llama"), tmp_path, cut_policy="max_bottom=3,max_top=2") as cloud:
        card = cloud.card
    assert (card.num_blocks, card.hidden_size, card.dtype) == (6, 32, "float32")
    assert (card.cut_policy.max_bottom, card.cut_policy.max_top) == (3, 2)
    assert (card.limits.max_tokens_per_step, card.limits.max_positions) == (4096, 64)
    assert card.fingerprint == card.key_bundle.fingerprint
    assert json.loads(card.config_json)["model_type"] == "llama"
