"""Whether a GPU gives the same bits when it runs a step again: `python benchmarks/gpu_bits.py`.

A packed trunk of a random Llama (8 blocks of width 1024) runs the same step over and over, alone on its
device: in bfloat16 with flash attention and in float32 with the fused kernel, with and without
`torch.use_deterministic_algorithms(True, warn_only=True)`. The table says how many of the later runs differ
from the first, and how far the farthest is away, relative to the first in the Euclidean norm. One unit in
the last place of bfloat16 is 7.8e-03.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tightbeam.common.backbone import PackedTrunk, Segments

RUNS = 21
STEPS = ((128,), (512,), (2048,), (512, 512, 512, 512))  # tokens of each sequence


@dataclass(frozen=True, slots=True)
class Repeats:
    """Later runs of a step beside its first."""

    differing: int
    farthest: float  # norm of the difference over the first run's norm

    @classmethod
    def of(cls, results: list[Tensor]) -> "Repeats":
        """Compare bit by bit."""
        first, *later = results
        apart = [float((x.float() - first.float()).norm() / first.float().norm()) for x in later]
        return cls(sum(not torch.equal(x, first) for x in later), max(apart))


def random_trunk(device: torch.device, dtype: torch.dtype, num_blocks: int = 8) -> PackedTrunk:
    """A Llama's blocks with random weights."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=1024, intermediate_size=2816, num_hidden_layers=num_blocks,
        num_attention_heads=16, num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return PackedTrunk(AutoModelForCausalLM.from_config(config, dtype=dtype).to(device))


def repeat(trunk: PackedTrunk, lengths: tuple[int, ...], runs: int = RUNS) -> tuple[Repeats, Repeats]:
    """Forward and backward of one step, as the cloud computes them."""
    segments = Segments(lengths, torch.cat([torch.arange(n) for n in lengths]))
    device, dtype = trunk.device(), next(trunk.model.parameters()).dtype
    shape, generator = (sum(lengths), trunk.hidden_size), torch.Generator().manual_seed(0)
    hidden_ND, grad_ND = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    outs, grads = list[Tensor](), list[Tensor]()
    for _ in range(runs):
        leaf_ND = hidden_ND.clone().requires_grad_()
        out_ND = trunk.run(leaf_ND, segments, range(trunk.num_blocks))
        grads += torch.autograd.grad(out_ND, leaf_ND, grad_ND)
        outs.append(out_ND.detach())
    return Repeats.of(outs), Repeats.of(grads)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """What torch offers for it; an operation that has no such way warns, and those warnings are not shown."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def main() -> None:
    """Print the machine and a table in Markdown."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "This needs a GPU with CUDA; on a CPU tests/exactness/test_bits.py shows equal bits."
        )
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {RUNS - 1} repeats a row\n")
    print("| dtype | tokens | deterministic algorithms | forwards that differ, farthest | backwards |")
    print("|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        trunk = random_trunk(device, dtype)
        for lengths in STEPS:
            tokens = f"{len(lengths)} x {lengths[0]}"
            for wanted in (False, True):
                with deterministic(wanted):
                    found = repeat(trunk, lengths)
                cells = [f"{r.differing}, {r.farthest:.1e}" if r.differing else "0" for r in found]
                row = (str(dtype).removeprefix("torch."), tokens, "on" if wanted else "off", *cells)
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
