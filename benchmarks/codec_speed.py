"""What coding costs beside the bytes that it saves: `python benchmarks/codec_speed.py [--device cuda]`.

A tensor of [8192, 576] floats is encoded where it lies, copied to the CPU as a payload, and decoded on the
same device again; one CPU thread. A delta codec's row is all that both ends do when a sample comes again:
look the bases up, encode, and remember what the other end will decode; look up, decode, remember. Deltas are
computed on the CPU whatever the device, in 64 segments that moved by a hundredth.

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

from tightbeam.common.config import DELTA
from tightbeam.common.wire.codecs import CODECS, codec
from tightbeam.common.wire.delta import (
    CHECK_BYTES,
    KEY_BYTES,
    BaseStore,
    Samples,
    checks_of,
    decode_delta,
    encode_delta,
)

ROUNDS = 12
BITS_PER_S = 1e9
SEGMENTS = 64
DELTAS = tuple(DELTA + name for name in ("int8", "int5", "int4"))

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


def delta(name: str, shape: tuple[int, int], device: torch.device) -> Halves:
    """Both ends of a delta; the sender leads."""
    inner, ours, theirs, crossing = name.removeprefix(DELTA), BaseStore(), BaseStore(), list[Tensor]()
    keys = [index.to_bytes(KEY_BYTES) for index in range(1, SEGMENTS + 1)]
    samples = Samples.of(keys, [shape[0] // SEGMENTS] * SEGMENTS, shape[1])
    checks: list[tuple[bytes, ...]] = []

    def encode(values_ND: Tensor) -> None:
        bases = ours.latest(samples)
        payload, decoded_ND = encode_delta(inner, values_ND, bases, samples.lengths)
        ours.remember(samples, decoded_ND)
        crossing[:], checks[:] = [payload], [checks_of(bases)]

    def decode() -> None:
        bases = theirs.find(samples, checks[0])
        decoded_ND = decode_delta(inner, crossing[0], bases, samples.lengths, shape[1])
        theirs.remember(samples, decoded_ND, bases)
        decoded_ND.to(device, torch.float32)

    return encode, decode


def timed(device: torch.device, names: list[str], shape: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Best seconds to encode and to decode, by codec."""
    values_ND = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    moved_ND = values_ND + 0.01 * values_ND.roll(1, dims=1)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    halves = {name: (delta if name.startswith(DELTA) else plain)(name, shape, device) for name in names}
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


def num_bytes(name: str, shape: tuple[int, int]) -> int:
    """What crosses: the payload, and for a delta the keys and digests that name its bases."""
    size = codec(name.removeprefix(DELTA)).num_bytes(shape)
    return size + SEGMENTS * (KEY_BYTES + CHECK_BYTES) if name.startswith(DELTA) else size


def main() -> None:
    """Print a line per codec, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=576)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = (arguments.tokens, arguments.hidden_size)
    names = [name for name in CODECS if name != "fp32"] + list(DELTAS)
    num_values = shape[0] * shape[1]
    rows: dict[str, dict[str, float]] = {}
    for name, spent in timed(torch.device(arguments.device), names, shape).items():
        crossing, coding_s = num_bytes(name, shape), sum(spent.values())
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
