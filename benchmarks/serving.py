"""What benchmarks over a real cloud share: the process, real texts, and a recipe for both.

Each runs as a module, `python -m benchmarks.NAME`, from the root of the repository.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tightbeam.common.files import cache_folder
from tightbeam.edge.recipe import Recipe, recipe_from_mapping
from tightbeam.simulations.demo_inputs import prepare_texts

__all__ = ["PROJECTION_TEXT", "chats", "cloud_process", "fitting", "insecure_recipe"]

PROJECTION_TEXT = "projection.txt"
_PROJECTION_CHARACTERS = 20_000


@contextlib.contextmanager
def cloud_process(model: Path, folder: Path, *options: str) -> Iterator[str]:
    """`tightbeam serve` in float32 on a free port of loopback, its ledger in `folder`; gives its address."""
    command = [
        sys.executable, "-m", "tightbeam.cli", "serve", "--model", str(model), "--listen", "127.0.0.1:0",
        "--ledger", str(folder / "ledger.db"), "--dtype", "float32", *options,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()  # printed once steps are accepted
        finally:
            process.terminate()


def chats(folder: Path, count: int) -> Path:
    """`count` of the demo's chats, spread over its topics; the rest is text for a projection beside them."""
    lines: list[str] = []
    for texts in prepare_texts(cache_folder(), folder):
        lines += texts.train.read_text(encoding="utf-8").splitlines()
    stride = max(len(lines) // count, 1)
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines[::stride][:count]) + "\n", encoding="utf-8")
    rest = "\n".join(line for number, line in enumerate(lines) if number % stride)
    (folder / PROJECTION_TEXT).write_text(rest[:_PROJECTION_CHARACTERS], encoding="utf-8")
    return path


def fitting(folder: Path) -> tuple[str, ...]:
    """Options of a cloud that fits its projection on what `chats` left there."""
    return ("--projection-text", str(folder / PROJECTION_TEXT), "--projection", str(folder / "p.safetensors"))


def insecure_recipe(model: Path, address: str, data: Path, name: str, **changes: Any) -> Recipe:
    """LoRA r=16, batches of 8, one thread; weights from `model`. `changes` are sections merged over it."""
    base: dict[str, Any] = {
        "model": {"cloud": address, "insecure": True, "local_path": str(model)},
        "adapter": {"r": 16, "alpha": 32},
        "data": {"train": str(data)},
        "train": {"batch_size": 8, "checkpoint_every": 0, "threads": 1},
        "output": {"dir": str(data.parent / "runs"), "name": name, "report": False},
    }
    for section, value in changes.items():
        base[section] = {**base[section], **value} if section in base and isinstance(value, dict) else value
    return recipe_from_mapping(base)
