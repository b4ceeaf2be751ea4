"""What coding costs beside the bytes that it saves: `python benchmarks/codec_speed.py [--device cuda]`.

A tensor of [8192, 576] floats is encoded where it lies, copied to the CPU as a payload, and decoded on the
same device again; one CPU thread.

The budget ratios are the time to encode and decode over the time that a link of 1 Gbit/s needs for the bytes
saved against fp32 and against bf16: below 1, coding pays. The best of the interleaved rounds counts. On the
CPU seconds are those that the thread had the processor, on a GPU those on the wall. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tightbeam.common.wire.codecs import CODECS

ROUNDS = 12
BITS_PER_S = 1e9

Halves = tuple[Callable[[Tensor], object], Callable[[], object]]
"""To encode a tensor, and to decode what was encoded last."""


def plain(name: str, shape: tuple[int, int], device: torch.device) -> Halves:
    """A codec by itself."""
    coder, sent = CODECS[name], list[Tensor]()

    def encode(values_ND: Tensor) -> None:
        sent[:] = [coder.encode(values_ND, seed=1)]  # ends on the CPU, so the device is done

    def decode() -> None:
        coder.decode(sent[0], shape, torch.float32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return encode, decode


def timed(device: torch.device, names: list[str], shape: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Best seconds to encode and to decode, by codec."""
    values_ND = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    moved_ND = values_ND + 0.01 * values_ND.roll(1, dims=1)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    halves = {name: plain(name, shape, device) for name in names}
    best: dict[str, dict[str, float]] = {name: {} for name in names}
    for step in range(-1, ROUNDS):  # the first is not counted
        for name, (encode, decode) in halves.items():
            started_s = clock()
            encode(moved_ND if step % 2 else values_ND)
            encoded_s = clock()
            decode()
            decoded_s = clock()
            spent = {"encode_s": encoded_s - started_s, "decode_s": decoded_s - encoded_s}
            if step >= 0:
                best[name] = {key: min(value, best[name].get(key, value)) for key, value in spent.items()}
    return best


def main() -> None:
    """Print a line per codec, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=576)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = (arguments.tokens, arguments.hidden_size)
    names = [name for name in CODECS if name != "fp32"]
    num_values = shape[0] * shape[1]
    rows: dict[str, dict[str, float]] = {}
    for name, spent in timed(torch.device(arguments.device), names, shape).items():
        crossing, coding_s = CODECS[name].num_bytes(shape), sum(spent.values())
        rows[name] = {
            "bytes_per_token": crossing / shape[0],
            "encode_ns_per_value": spent["encode_s"] / num_values * 1e9,
            "decode_ns_per_value": spent["decode_s"] / num_values * 1e9,
            "coding_ms": coding_s * 1e3,
            "budget_ratio": coding_s / ((4 * num_values - crossing) * 8 / BITS_PER_S),
        }
        if name != "bf16":
            rows[name]["budget_ratio_bf16"] = coding_s / ((2 * num_values - crossing) * 8 / BITS_PER_S)
        print(f"{name:10}", "  ".join(f"{key} {value:8.3f}" for key, value in rows[name].items()))
    print(json.dumps({"device": arguments.device, "shape": shape, "codecs": rows}))


if __name__ == "__main__":
    main()
