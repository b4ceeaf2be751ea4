"""`connect()` and what a connected cloud gives: refusals with a cure, downloads, local weights, usage.

Over gRPC on loopback; the cloud is on a thread of this process.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.clouds import free_port
from support.comparing import compare, lora, twins
from support.edge_runs import byte_tokenizer, tiny_llama
from support.in_process import InProcessCloud
from support.tiny import ragged_batch, tiny_model
from tightbeam.common.errors import (
    CloudUnavailableError,
    CutError,
    FingerprintError,
    IdentityError,
    TightbeamError,
    UsageError,
)
from tightbeam.edge import Cloud, connect
from tightbeam.edge.recipe import Codecs
from tightbeam.proto import backbone_pb2 as pb

Clouds = Callable[[str], InProcessCloud]


@pytest.fixture
def edge(tiny_cloud: Clouds) -> Iterator[Cloud]:
    with connect(tiny_cloud("llama").address, insecure=True) as cloud:
        yield cloud


def test_an_identity_is_needed_unless_told_otherwise() -> None:
    with pytest.raises(IdentityError, match="tightbeam certs init"):
        connect("127.0.0.1:1")


def test_nobody_listens() -> None:
    with pytest.raises(CloudUnavailableError, match="does not answer"):
        connect(f"127.0.0.1:{free_port()}", insecure=True, wait_s=0.3)


def test_another_backbone_than_expected(tiny_cloud: Clouds) -> None:
    cloud = tiny_cloud("llama")
    with connect(cloud.address, insecure=True, fingerprint=cloud.backbone.fingerprint) as edge:
        assert edge.card.fingerprint == cloud.backbone.fingerprint
    with pytest.raises(FingerprintError, match="serves the backbone"):
        connect(cloud.address, insecure=True, fingerprint="ab" * 32)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("0:2", "1 to 16 bottom blocks, not 0"),
        ("3:3", "leaves no trunk: the model has 6 blocks"),
        ("four", "is not a cut"),
    ],
)
def test_a_cut_that_is_not_allowed(edge: Cloud, cut: str, words: str) -> None:
    with pytest.raises(CutError, match=words):
        edge.load_model(cut)


def test_a_cut_that_only_the_edge_believes_in(edge: Cloud) -> None:
    """The cloud checks for itself: a patched edge gets the same refusal."""
    stepper = edge.open_steps("0:2")
    with pytest.raises(CutError, match="1 to 16 bottom blocks, not 0"):
        stepper._carrier._open_channel()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "zip"}, "'zip' names no codecs"),
        ({"dtype": "float8"}, "Unknown dtype"),
        ({"device": "abacus"}, "not available here"),
    ],
)
def test_an_option_that_nobody_knows(edge: Cloud, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        edge.load_model("1:2", **options)


def test_auto_changes_no_bit(edge: Cloud) -> None:
    assert set(edge._codecs("auto", torch.float32).model_dump().values()) == {"fp32"}
    assert set(edge._codecs("auto", torch.bfloat16).model_dump().values()) == {"bf16"}
    mixed = edge._codecs(Codecs(activations_up="int8"), torch.float32).model_dump()
    assert mixed.pop("activations_up") == "int8"
    assert set(mixed.values()) == {"fp32"}


def test_a_codec_that_cannot_be_read(edge: Cloud) -> None:
    with pytest.raises(UsageError, match="'INT4' names no codecs"):
        edge.load_model("1:2", codec="INT4")


def test_only_the_blobs_of_the_cut_are_fetched(
    tiny_cloud: Clouds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "cache"))
    rows: list[dict[str, Any]] = []
    with connect(tiny_cloud("llama").address, insecure=True, on_row=rows.append) as edge:
        edge.load_model("1:2")
        first = {row["name"] for row in rows}
        assert first == {"embedding", "rest", "block.0", "block.4", "block.5", "file/generation_config.json"}
        sizes = {blob.name: blob.num_bytes for blob in edge.card.blobs}
        for row in rows:
            assert row["kind"] == "weights"
            assert row["wire_down_bytes"] > sizes[row["name"]]
        rows.clear()
        edge.load_model("2:1")  # shares all but one block with the first
        assert [row["name"] for row in rows] == ["block.1"]


def test_local_weights_are_the_same_model(
    edge: Cloud, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = edge.load_model("1:2")
    monkeypatch.setattr(edge, "_store", None)  # nothing can be downloaded
    local = edge.load_model("1:2", local_path=tiny_folder("llama"))
    other = dict(local.named_parameters())
    assert other.keys() == dict(fetched.named_parameters()).keys()
    assert all(torch.equal(parameter, other[name]) for name, parameter in fetched.named_parameters())
    split, whole = twins(local, tiny_model("llama"), lora("llama"))
    assert compare(split, whole, ragged_batch(3, 9, side="right")).loss <= 1e-6


def test_local_weights_of_another_model_are_refused(edge: Cloud, tmp_path: Path) -> None:
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(FingerprintError, match="is not the backbone"):
        edge.load_model("1:2", local_path=tmp_path / "other")
    with pytest.raises(UsageError, match=r"no config\.json"):
        edge.load_model("1:2", local_path=tmp_path)


def test_the_tokenizer_comes_along_and_runs_no_code(tmp_path: Path) -> None:
    """A tokenizer that names code of its own is not asked about, and not run."""
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with (
        InProcessCloud(tmp_path / "model", tmp_path / "a") as cloud,
        connect(cloud.listen(), insecure=True) as edge,
    ):
        tokenizer = edge.load_tokenizer()
        assert tokenizer("split").input_ids == byte_tokenizer()("split").input_ids
    settings_file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    settings_file.write_text(json.dumps(settings))
    tiny_llama(seed=1).save_pretrained(tmp_path / "model")
    with (
        InProcessCloud(tmp_path / "model", tmp_path / "b") as cloud,
        connect(cloud.listen(), insecure=True) as edge,
        pytest.raises(UsageError, match="no usable tokenizer"),
    ):
        edge.load_tokenizer()


def test_a_model_without_a_tokenizer_says_so(edge: Cloud) -> None:
    with pytest.raises(UsageError, match="no usable tokenizer"):
        edge.load_tokenizer()


def test_usage_is_the_callers_own(tiny_cloud: Clouds) -> None:
    address, batch = tiny_cloud("llama").address, ragged_batch(2, 7, side="right")
    with connect(address, insecure=True, name="anna", run="usage") as anna:
        with torch.no_grad():
            anna.load_model("1:2")(**batch)
        assert [(row.run, row.forward_steps, row.tokens) for row in anna.usage()] == [
            ("usage", 1, int(batch["attention_mask"].sum()))
        ]
    with connect(address, insecure=True, name="bert") as bert:
        assert list(bert.usage()) == []


def test_a_run_has_a_name_of_its_own(tiny_cloud: Clouds) -> None:
    with (
        connect(tiny_cloud("llama").address, insecure=True) as first,
        connect(tiny_cloud("llama").address, insecure=True) as second,
    ):
        assert first.run != second.run
        assert first.config["model_type"] == "llama"


def test_a_download_that_the_cloud_does_not_have(edge: Cloud) -> None:
    fetch, blob = edge._store._fetch, edge.card.blobs[0]
    with pytest.raises(TightbeamError, match="no such blob"):
        list(fetch(pb.Blob(sha256="ab" * 32), 0))
    assert list(fetch(blob, blob.num_bytes)) == []
    with pytest.raises(TightbeamError, match="no such blob"):
        list(fetch(blob, blob.num_bytes + 1))


def test_after_close_steps_fail(tiny_cloud: Clouds) -> None:
    with connect(tiny_cloud("llama").address, insecure=True) as edge:
        model = edge.load_model("1:2")
    with pytest.raises(UsageError, match=r"was closed.*with connect"), torch.no_grad():
        model(**ragged_batch(1, 6, side="right"))
