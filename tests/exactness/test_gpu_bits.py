"""What docs/architecture.md says of running a step again, with the measure of benchmarks/gpu_bits.py.

On a CPU the bits are the same. On a GPU those of a forward alone are; a backward may round otherwise.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "gpu_bits.py"))
BF16_ROUNDING = torch.finfo(torch.bfloat16).eps

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU with CUDA: bits on a CPU say nothing about it"
)


@needs_cuda
@pytest.mark.parametrize("wanted", [False, True], ids=["as it is", "deterministic"])
@pytest.mark.parametrize("tokens", [128, 512, 2048])
def test_on_a_gpu_forwards_repeat_and_backwards_stay_within_rounding(tokens: int, wanted: bool) -> None:
    trunk = SCRIPT["random_trunk"](torch.device("cuda"), torch.bfloat16)
    with SCRIPT["deterministic"](wanted):
        forward, backward = SCRIPT["repeat"](trunk, (tokens,))
    assert forward.differing == 0
    assert backward.farthest <= BF16_ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_both_repeat(dtype: torch.dtype) -> None:
    trunk = SCRIPT["random_trunk"](torch.device("cpu"), dtype, num_blocks=1)
    for lengths in ((128,), (40, 40), (30, 7)):
        forward, backward = SCRIPT["repeat"](trunk, lengths, runs=3)
        assert forward.differing == backward.differing == 0


def test_the_measure_sees_one_bit() -> None:
    first = torch.ones(4, dtype=torch.bfloat16)
    other = first.clone()
    other[0] += BF16_ROUNDING
    seen = SCRIPT["Repeats"].of([first, first.clone(), other])
    assert seen.differing == 1
    assert 0 < seen.farthest <= BF16_ROUNDING
