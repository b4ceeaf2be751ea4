"""A cloud's card and config run nothing at the edge, ask nothing, and take no memory without bound."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.in_process import InProcessCloud
from support.tiny import TINY
from tightbeam.common.backbone import Cut, build_skeleton, config_from_dict, fingerprint
from tightbeam.common.errors import IdentityError, ProtocolError, TightbeamError, UnsupportedModelError
from tightbeam.edge import connect
from tightbeam.edge.link.offer import require_signed
from tightbeam.edge.model.split_model import build_split_model
from tightbeam.edge.model.weights import BlobStore, check_card
from tightbeam.proto.backbone_pb2 import Blob, Card

_LLAMA = {"model_type": "llama", **TINY["llama"]}


def _card(cloud: InProcessCloud) -> Card:
    card = Card()
    card.CopyFrom(cloud.card)
    return card


def test_code_that_a_config_names_is_neither_asked_about_nor_run() -> None:
    code = {"auto_map": {"AutoModelForCausalLM": "evil--m.Evil"}, "_attn_implementation": "evil/kernel"}
    model = build_skeleton(config_from_dict(_LLAMA | code), torch.float32)
    assert type(model).__module__.startswith("transformers.models.llama")
    assert not hasattr(model.config, "auto_map")
    assert model.config._attn_implementation != "evil/kernel"


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2**32},
        {"hidden_size": 2**40},
        {"vocab_size": 2**60},
        {"num_attention_heads": 10**9},
        {"rope_scaling": {"original_max_position_embeddings": 2**62}},
        {"model_type": "evil"},
        {"model_type": ["llama"]},
        {"hidden_act": "evil"},
        {"num_hidden_layers": "many"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
    ],
    ids=str,
)
def test_a_config_out_of_bounds_is_one_clear_line(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        build_skeleton(config_from_dict(_LLAMA | change), torch.float32)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 2**32 - 1},
        {"hidden_size": 2**31},
        {"model": "\x1b[2Jnice"},
        {"version": "v" * 10_000},
        {"config_json": "[]"},
        {"config_json": "null"},
    ],
    ids=str,
)
def test_a_card_out_of_bounds_is_refused(
    tiny_cloud: Callable[[str], InProcessCloud], change: dict[str, Any]
) -> None:
    card = _card(tiny_cloud("llama"))
    check_card(card)
    card.MergeFrom(Card(**change))
    if "config_json" in change:
        weights = {b.name: b.sha256 for b in card.blobs if not b.name.startswith("file/")}
        card.fingerprint = fingerprint(json.loads(card.config_json), weights)
    with pytest.raises(ProtocolError):
        check_card(card)


def _other_files() -> dict[str, Callable[[Card], object]]:
    def first(card: Card) -> Blob:
        return next(blob for blob in card.blobs if blob.name.startswith("file/"))

    return {
        "another content": lambda card: setattr(first(card), "sha256", "cd" * 32),
        "another size": lambda card: setattr(first(card), "num_bytes", 7),
        "another name": lambda card: setattr(first(card), "name", "file/chat_template.jinja"),
        "one file less": lambda card: card.blobs.remove(first(card)),
        "one file more": lambda card: card.blobs.add(name="file/chat_template.jinja", sha256="cd" * 32),
        "another number format": lambda card: setattr(card, "dtype", "bfloat16"),
    }


@pytest.mark.parametrize("change", _other_files().values(), ids=_other_files())
def test_files_that_the_clouds_identity_does_not_vouch_for_are_refused(
    tiny_cloud: Callable[[str], InProcessCloud],
    change: Callable[[Card], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cloud = tiny_cloud("llama")
    if not cloud.address:
        cloud.listen()
    altered = Card()
    altered.CopyFrom(cloud.service._card)
    change(altered)
    with connect(cloud.address, insecure=True) as edge:
        steps = edge.open_steps("1:2")._carrier
        steps._open_channel().close()
        monkeypatch.setattr(cloud.service, "_card", altered)
        with pytest.raises(TightbeamError, match=r"vouches for|computes in"):
            steps._open_channel()
    with pytest.raises(IdentityError, match="number format or files are not those"):
        connect(cloud.address, insecure=True)


def test_a_bundle_that_vouches_for_no_files_is_refused() -> None:
    with pytest.raises(IdentityError, match="vouches for"):
        require_signed(Card(dtype="float32"))


def test_files_and_weights_are_no_larger_than_a_models(
    tiny_cloud: Callable[[str], InProcessCloud], tmp_path: Path
) -> None:
    cloud = tiny_cloud("llama")
    card, asked = _card(cloud), list[str]()

    def fetch(blob: Blob, offset: int) -> Iterator[bytes]:
        asked.append(blob.name)
        yield b""

    def build() -> None:
        store = BlobStore(tmp_path, fetch)
        build_split_model(
            card, Cut.parse("1:2"), cloud.stepper("large"), store, dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip

    next(blob for blob in card.blobs if blob.name == "block.0").num_bytes = 1 << 30
    with pytest.raises(ProtocolError, match="more bytes of weights than the model has room for"):
        build()
    card.num_blocks = 5
    with pytest.raises(ProtocolError, match="says 5 blocks"):
        build()
    assert asked == []
    card = _card(cloud)
    card.blobs.add(name="file/tokenizer.json", sha256="ab" * 32, num_bytes=1 << 40)
    with pytest.raises(TightbeamError, match="256 MB"):
        check_card(card)
