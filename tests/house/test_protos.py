"""The committed generated code is what `make protos` writes from the contract."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "proto" / "tightbeam" / "proto"
GENERATED = ("backbone_pb2.py", "backbone_pb2.pyi", "backbone_pb2_grpc.py", "backbone_pb2_grpc.pyi")


def generate(proto_root: Path, output: Path) -> dict[str, bytes]:
    """Run the compiler as the Makefile does; gives the bytes of each file."""
    kinds = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{proto_root}",
        *(f"--{kind}={output}" for kind in kinds),
    ]
    plugins = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [*command, str(proto_root / "tightbeam" / "proto" / "backbone.proto")],
        env=os.environ | {"PATH": plugins},
        check=True,
        capture_output=True,
    )
    return {name: (output / "tightbeam" / "proto" / name).read_bytes() for name in GENERATED}


@pytest.mark.parametrize("name", GENERATED)
def test_committed_code_is_what_the_contract_generates(name: str, tmp_path: Path) -> None:
    fresh = generate(ROOT / "proto", tmp_path)
    assert fresh[name] == (FOLDER / name).read_bytes(), "run `make protos` and commit the result"


def test_a_changed_contract_would_be_seen(tmp_path: Path) -> None:
    contract = tmp_path / "in" / "tightbeam" / "proto" / "backbone.proto"
    contract.parent.mkdir(parents=True)
    text = (FOLDER / "backbone.proto").read_text(encoding="utf-8")
    contract.write_text(text + "\nmessage Stranger { uint32 one = 1; }\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    fresh = generate(tmp_path / "in", tmp_path / "out")
    assert fresh["backbone_pb2.py"] != (FOLDER / "backbone_pb2.py").read_bytes()
