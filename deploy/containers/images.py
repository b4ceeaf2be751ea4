"""Images of this repository, built where a registry is reached and where none is."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from containers.engine import Engine, pip_options

__all__ = ["IMAGE", "build_haproxy", "build_image", "build_options", "build_postgres"]

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "tightbeam:0.1.0"
_BASE = "python:3.11-slim"
_DEBIAN = "tightbeam-base:bookworm"  # made here, with Debian's Python 3.11
_PACKAGES = "ca-certificates,python3,python3-pip,python3-venv"
_MIRROR = "http://deb.debian.org/debian"
_TOO_MUCH = (
    "var/cache/apt/archives",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
)
_BUILD_S = 3600.0


def build_image(engine: Engine) -> int:
    """Build the image for CPUs; its bytes, unpacked."""
    with tempfile.TemporaryDirectory(prefix="tightbeam-build-") as folder:
        options = build_options(engine, Path(folder))
        engine.run("build", *options, "--tag", IMAGE, str(ROOT), within_s=_BUILD_S)
    return int(json.loads(engine.run("image", "inspect", IMAGE))[0]["Size"])


def build_options(engine: Engine, folder: Path) -> list[str]:
    """Base, index of torch and pip's settings as this machine has them; `folder` lasts while it builds."""
    options = [f"--build-arg=BASE_IMAGE={_base(engine)}"]
    if not _is_reached("download.pytorch.org"):
        options.append("--build-arg=TORCH_INDEX=")  # pip's own folders must have it then
    return options + pip_options(engine, folder)


def build_haproxy(engine: Engine) -> str:
    """Name of an image with HAProxy: the compose file's own, or one of Debian's package."""
    name = "haproxy:3.2-alpine"
    if engine.code("image", "inspect", name) == 0 or engine.code("pull", "--quiet", name) == 0:
        return name
    return _from_debian(engine, "haproxy")


def build_postgres(engine: Engine) -> str:
    """Name of an image with PostgreSQL: the compose file's own, or Debian's package that starts like it."""
    name = "postgres:17-alpine"
    if engine.code("image", "inspect", name) == 0 or engine.code("pull", "--quiet", name) == 0:
        return name
    return _from_debian(engine, "postgresql", ROOT / "deploy" / "containers" / "postgres.sh")


def _from_debian(engine: Engine, package: str, start: Path | None = None) -> str:
    """Name of an image with a Debian package, and a script that starts it, where no registry is reached."""
    name = f"tightbeam-{package}:bookworm"
    lines = [
        f"FROM {_base(engine)}",
        "RUN apt-get -qq update"
        " && DEBIAN_FRONTEND=noninteractive"
        f" apt-get -qq install -y --no-install-recommends {package}"
        " && rm -rf /var/lib/apt/lists/*",
    ]
    with tempfile.TemporaryDirectory(prefix="tightbeam-build-") as folder:
        if start is not None:
            shutil.copy(start, folder)
            lines += [f"COPY {start.name} /start", 'ENTRYPOINT ["sh", "/start"]']
        (Path(folder) / "Dockerfile").write_text("\n".join(lines), encoding="utf-8")
        engine.run("build", "--network=host", "--tag", name, folder, within_s=_BUILD_S)
    return name


def _base(engine: Engine) -> str:
    """BASE_IMAGE, or python:3.11-slim where it is here or can be had, or Debian's Python."""
    if "BASE_IMAGE" in os.environ:
        return os.environ["BASE_IMAGE"]
    for name in (_BASE, _DEBIAN):
        if engine.code("image", "inspect", name) == 0:
            return name
    if engine.code("pull", "--quiet", f"docker.io/library/{_BASE}") == 0:
        return _BASE
    _debootstrap(engine)
    return _DEBIAN


def _debootstrap(engine: Engine) -> None:
    if not shutil.which("debootstrap") or os.getuid():
        raise SystemExit("error: no registry is reached. Install debootstrap and be root, or set BASE_IMAGE.")
    with tempfile.TemporaryDirectory(prefix="tightbeam-base-", dir="/var/tmp") as folder:
        mirror = os.environ.get("DEBIAN_MIRROR", _MIRROR)
        words = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", folder, mirror]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        for part in _TOO_MUCH:
            shutil.rmtree(Path(folder) / part, ignore_errors=True)
        (Path(folder) / "var/lib/apt/lists/partial").mkdir(parents=True)
        (Path(folder) / "var/cache/apt/archives/partial").mkdir(parents=True)
        packed = subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE)  # noqa: S603, S607
        subprocess.run(  # noqa: S603
            [engine.name, "import", "-", _DEBIAN], stdin=packed.stdout, env=engine.environment, check=True
        )
        if packed.wait():
            raise SystemExit("error: the base image could not be packed.")


def _is_reached(host: str) -> bool:
    try:
        socket.create_connection((host, 443), 5.0).close()
    except OSError:
        return False
    return True
