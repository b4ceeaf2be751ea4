"""The image, built once, with a small model and texts; skipped where nothing runs containers."""

import subprocess
from pathlib import Path

import pytest

from containers.engine import Engine, find_engine
from containers.images import build_image
from support.edge_runs import byte_tokenizer, tiny_llama, write_jsonl


@pytest.fixture(scope="session")
def engine() -> Engine:
    found = find_engine()
    if isinstance(found, str):
        pytest.skip(found)
    build_image(found)
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose parents let other users through, which pytest's own do not."""
    base = tmp_path_factory.mktemp("containers")
    for path in (base, *base.parents[:2]):
        path.chmod(0o755)
    return base


@pytest.fixture(scope="session")
def backbone(folder: Path) -> Path:
    saved = folder / "model"
    tiny_llama(num_hidden_layers=10).save_pretrained(saved)
    byte_tokenizer().save_pretrained(saved)
    subprocess.run(["chmod", "-R", "a+rX", str(saved)], check=True)
    return saved


@pytest.fixture(scope="session")
def texts(folder: Path) -> list[Path]:
    """Two files of forty chats."""
    paths = []
    for name, factor in (("sums", 1), ("products", 2)):
        rows = [{"prompt": f"{n} {name}?", "completion": f"It is {n * factor}."} for n in range(60)]
        paths.append(write_jsonl(folder / f"{name}.jsonl", rows))
    return paths
