"""The edge's weights: resumed, verified, shared, and never where a hostile cloud wants them."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from support.in_process import InProcessCloud
from support.tiny import tiny_model
from tightbeam.common.backbone import build_skeleton, config_from_dict, dissect
from tightbeam.common.errors import FingerprintError, IntegrityError, ProtocolError, TightbeamError
from tightbeam.common.files import cache_folder
from tightbeam.edge.model.weights import BlobStore, check_card, local_source
from tightbeam.proto.backbone_pb2 import Blob, Card

_DATA = bytes(range(256)) * 40


class Source:
    """Stands where Download does; notes what was asked, and may stop or lie."""

    def __init__(self, data: bytes = _DATA, stop_after: int | None = None) -> None:
        self.data, self.stop_after = data, stop_after
        self.asked: list[int] = []

    def __call__(self, blob: Blob, offset: int) -> Iterator[bytes]:
        self.asked.append(offset)
        for sent, start in enumerate(range(offset, len(self.data), 1000)):
            if sent == self.stop_after:
                raise TightbeamError("The line went dead.")
            yield self.data[start : start + 1000]


def _blob(data: bytes = _DATA, name: str = "block.0") -> Blob:
    return Blob(name=name, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "blobs").iterdir())


def test_a_blob_is_fetched_once(tmp_path: Path) -> None:
    source, seen = Source(), list[tuple[str, int, int]]()
    store = BlobStore(tmp_path, source, lambda *progress: seen.append(progress))
    assert store.get(_blob()).read_bytes() == _DATA
    assert store.get(_blob()).read_bytes() == _DATA
    assert source.asked == [0]
    assert seen[-1] == ("block.0", len(_DATA), len(_DATA))
    assert _left(tmp_path) == [_blob().sha256]


def test_a_broken_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(TightbeamError, match="line went dead"):
        BlobStore(tmp_path, Source(stop_after=3)).get(_blob())
    source = Source()
    assert BlobStore(tmp_path, source).get(_blob()).read_bytes() == _DATA
    assert source.asked == [3000]


_CHILD = """
import os, sys
from pathlib import Path
from tightbeam.edge.model.weights import BlobStore
from tightbeam.proto.backbone_pb2 import Blob
folder, data = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
def fetch(blob, offset):
    for start in range(offset, len(data), 1000):
        if start == 5000:
            print("half way", flush=True)
            if sys.stdin.readline() != "go on\\n":
                os._exit(9)
        yield data[start : start + 1000]
print(BlobStore(folder, fetch).get(Blob(name="b", sha256=sys.argv[3], num_bytes=len(data))).name)
"""


def _half_way(folder: Path, inside: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """Another process in the middle of a download: it goes on or dies as its input says."""
    (folder / "data").write_bytes(_DATA)
    command = [*inside, sys.executable, "-c", _CHILD, str(folder), str(folder / "data"), _blob().sha256]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "half way\n"
    return child


def test_a_killed_process_leaves_its_part_to_the_next(tmp_path: Path) -> None:
    child = _half_way(tmp_path)
    child.communicate("die\n", timeout=60)
    assert child.returncode == 9
    written = sum(path.stat().st_size for path in (tmp_path / "blobs").iterdir())
    source = Source()
    assert BlobStore(tmp_path, source).get(_blob()).read_bytes() == _DATA
    assert source.asked == [written]
    assert _left(tmp_path) == [_blob().sha256]


def test_two_processes_fetch_the_same_blob(tmp_path: Path) -> None:
    child = _half_way(tmp_path)
    source = Source()
    assert BlobStore(tmp_path, source).get(_blob()).read_bytes() == _DATA
    assert source.asked == [0]  # the part of a process that lives is left alone
    out, _ = child.communicate("go on\n", timeout=60)
    assert (child.returncode, out) == (0, f"{_blob().sha256}\n")
    assert (tmp_path / "blobs" / _blob().sha256).read_bytes() == _DATA
    assert _left(tmp_path) == [_blob().sha256]


def test_threads_of_one_process_fetch_it_once(tmp_path: Path) -> None:
    source = Source()
    store = BlobStore(tmp_path, source)
    threads = [threading.Thread(target=store.get, args=(_blob(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.asked == [0]
    assert (tmp_path / "blobs" / _blob().sha256).read_bytes() == _DATA


@pytest.mark.parametrize(
    "sent", [_DATA[:-1], _DATA[:-1] + b"x", _DATA + b"x", b""], ids=["short", "altered", "long", "nothing"]
)
def test_other_bytes_are_not_kept(tmp_path: Path, sent: bytes) -> None:
    store = BlobStore(tmp_path, Source(sent))
    with pytest.raises(IntegrityError, match="does not have the hash"):
        store.get(_blob())
    assert _left(tmp_path) == []
    assert BlobStore(tmp_path, Source()).get(_blob()).read_bytes() == _DATA


def test_a_cloud_that_never_stops_sending_is_stopped(tmp_path: Path) -> None:
    def endless(blob: Blob, offset: int) -> Iterator[bytes]:
        for sent in range(1 << 20):
            assert sent * 1000 <= len(_DATA) + 1000
            yield bytes(1000)

    with pytest.raises(IntegrityError):
        BlobStore(tmp_path, endless).get(_blob())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "blobs" / _blob().sha256).mkdir(parents=True)  # where the finished blob should go
    with pytest.raises(TightbeamError, match="TIGHTBEAM_CACHE"):
        BlobStore(tmp_path, Source()).get(_blob())


def test_a_blob_that_the_disk_cannot_hold_is_not_begun(tmp_path: Path) -> None:
    source, blob = Source(), _blob()
    blob.num_bytes = 1 << 62
    with pytest.raises(TightbeamError, match=r"4611686018\.43 GB, and .* GB free\. Free disk space"):
        BlobStore(tmp_path, source).get(blob)
    assert source.asked == []


def test_a_damaged_blob_of_the_cache_is_fetched_again(tmp_path: Path) -> None:
    source = Source()
    target = BlobStore(tmp_path, source).get(_blob())
    target.write_bytes(bytes(len(_DATA)))
    store = BlobStore(tmp_path, source)
    assert store.get(_blob()).read_bytes() == store.get(_blob()).read_bytes() == _DATA
    assert source.asked == [0, 0]


def test_what_is_hashed_is_what_is_on_disk(tmp_path: Path) -> None:
    """Another process that takes the partial file for its own may write what it likes."""

    def meddled(blob: Blob, offset: int) -> Iterator[bytes]:
        yield _DATA
        (part,) = (tmp_path / "blobs").iterdir()
        with part.open("r+b") as stream:
            stream.write(b"another's")

    with pytest.raises(IntegrityError, match="does not have the hash"):
        BlobStore(tmp_path, meddled).get(_blob())
    assert _left(tmp_path) == []


def test_two_containers_fetch_the_same_blob(tmp_path: Path) -> None:
    """Each has processes of its own: the same id in both, and nobody sees the other's."""
    inside = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespaces here")
    children = [_half_way(tmp_path, inside) for _ in range(2)]
    for child in children:
        out, _ = child.communicate("go on\n", timeout=60)
        assert (child.returncode, out) == (0, f"{_blob().sha256}\n")
    assert (tmp_path / "blobs" / _blob().sha256).read_bytes() == _DATA
    assert _left(tmp_path) == [_blob().sha256]


def test_a_weight_blob_that_is_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        BlobStore(tmp_path, Source()).source([_blob()])


def _card(**changes: object) -> Card:
    from tightbeam.common.backbone import fingerprint

    card = Card(
        config_json="{}",
        num_blocks=6,
        hidden_size=32,
        blobs=[_blob()],
        fingerprint=fingerprint({}, {"block.0": _blob().sha256}),
    )
    card.MergeFrom(Card(**changes))  # type: ignore[arg-type]  # the stubs want one type for each name
    return card


def test_a_card_that_contradicts_itself() -> None:
    check_card(_card())
    with pytest.raises(FingerprintError, match="list of weights"):
        check_card(_card(blobs=[_blob(b"more", "block.1")]))
    with pytest.raises(FingerprintError, match="list of weights"):
        check_card(_card(config_json='{"x": 1}'))
    with pytest.raises(ProtocolError, match="not JSON"):
        check_card(_card(config_json="{"))


@pytest.mark.parametrize("name", ["../../escape", "*", "", "A" * 64, "/etc/passwd", "a" * 63 + "\n"])
def test_a_hash_that_is_a_path_is_refused(name: str) -> None:
    """It becomes a file name in the cache."""
    with pytest.raises(ProtocolError, match="SHA-256"):
        check_card(_card(blobs=[Blob(name="file/x", sha256=name)]))


@pytest.mark.parametrize(
    "name",
    [
        "../escape.json",
        "file/../../escape.json",
        "/abs.json",
        "sub/tokenizer.json",
        "evil.py",
        ".bashrc",
        "..\\x",
    ],
)
def test_a_file_name_of_the_clouds_choosing_is_not_written(tmp_path: Path, name: str) -> None:
    content = b"{}"
    card = Card(fingerprint="ab" * 32)
    card.blobs.append(_blob(content, f"file/{name}"))
    card.blobs.append(_blob(content, "file/tokenizer.json"))
    folder = BlobStore(tmp_path / "cache", Source(content)).files(card)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in written} == {"tokenizer.json", _blob(content).sha256}


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("TIGHTBEAM_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "tightbeam"


def test_a_local_checkpoint_of_another_backbone_is_refused(
    tiny_cloud: Callable[[str], InProcessCloud], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    card = tiny_cloud("llama").card
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")

    def source(folder: Path) -> object:
        model = build_skeleton(config_from_dict(json.loads(card.config_json)), tiny_model("llama").dtype)
        return local_source(folder, card, model, dissect(model))

    assert callable(source(tiny_folder("llama")))
    with pytest.raises(FingerprintError, match="is not the backbone that the cloud serves"):
        source(tmp_path / "other")
