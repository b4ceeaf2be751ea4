"""Builds the image and runs both compose files as containers, to the end; prints times and sizes.

    make containers                       # all of it
    PYTHONPATH=deploy python -m containers build

Docker or Podman, whichever runs here. Where no registry is reached the base image is made of Debian's
packages, and HAProxy comes from there too. The cloud's model is MODEL, or the demo's.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from containers.engine import find_engine
from containers.images import build_haproxy, build_image
from containers.page import run_page
from containers.work import run_demo, run_federation

_PARTS = ("demo", "federation", "page")
Result = TypeVar("Result")


def inputs(folder: Path) -> tuple[Path, list[Path]]:
    """A copy of the model that any user can read, and the demo's texts."""
    from tightbeam.common.files import cache_folder
    from tightbeam.simulations.demo_inputs import prepare_model, prepare_texts

    model = Path(os.environ["MODEL"]) if "MODEL" in os.environ else prepare_model(cache_folder())
    shutil.copytree(model, folder / "model")
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)  # noqa: S603, S607
    return folder / "model", [texts.train for texts in prepare_texts(cache_folder(), folder / "texts")]


def timed(what: str, work: Callable[[], Result]) -> Result:
    """Do something and say how long it took."""
    started = time.monotonic()
    print(f"{what} ...", flush=True)
    result = work()
    print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, then run what was asked for."""
    parser = argparse.ArgumentParser(description="Build the image and run the compose files as containers.")
    parser.add_argument("what", nargs="*", default=list(_PARTS), help=f"build, {', '.join(_PARTS)}")
    chosen = parser.parse_args(arguments)
    engine = find_engine()
    if isinstance(engine, str):
        raise SystemExit(f"error: {engine}")
    bytes_of_image = timed("image", lambda: build_image(engine))
    print(f"image: {bytes_of_image / 1e9:.2f} GB")
    with tempfile.TemporaryDirectory(prefix="tightbeam-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        model, texts = inputs(folder) if set(_PARTS) & set(chosen.what) else (folder, [])
        if "demo" in chosen.what:
            found = timed("demo", lambda: run_demo(engine, folder / "demo", model, texts))
            for edge, summary in found.items():
                loss = " to ".join(
                    f"{value:.3f}" for _, value in (summary["eval_loss"][0], summary["eval_loss"][-1])
                )
                print(f"{edge}: {summary['optimizer_steps']} steps, evaluation loss {loss}")
        if "federation" in chosen.what:
            haproxy = timed("HAProxy", lambda: build_haproxy(engine))
            account = timed(
                "federation", lambda: run_federation(engine, folder / "federation", model, texts, haproxy)
            )
            for row in account["rounds"]:
                print(f"round {row['round']}: {row['updates']} updates")
        if "page" in chosen.what:
            timed("docs/deployment.md", lambda: run_page(engine, folder / "page", model, texts))


if __name__ == "__main__":
    main()
