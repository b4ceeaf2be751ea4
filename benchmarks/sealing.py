"""How fast records are sealed and opened, beside the bare cipher call: `python benchmarks/sealing.py`.

One thread, chunks of 1 MiB, the four loops interleaved round by round so that a noisy machine disturbs all of
them alike; the best round counts. GB is 1e9 bytes. The last line is JSON; `seal_ratio` and `open_ratio` are
our throughput over the cipher's own.
"""

import json
import os
import time
from collections.abc import Callable

from tightbeam.common.wire.records import (
    CHUNK_BYTES,
    TAG_BYTES,
    Aead,
    Direction,
    Opener,
    Sealer,
    chunk_context,
)

ROUNDS, CHUNKS = 24, 8
CONTEXT = chunk_context(bytes(32), 0, 0, 1)


def loops(aead: Aead) -> dict[str, Callable[[], None]]:
    """The loops to time; each moves `CHUNKS` MiB."""
    ends = (bytes(32), bytes(16), Direction.EDGE_TO_CLOUD, aead)
    sealer, sealer_for_opening, opener = Sealer(*ends), Sealer(*ends), Opener(*ends)
    cipher, nonce = aead.cipher(bytes(32)), bytes(12)
    chunk, out = memoryview(os.urandom(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES))
    # Records are opened once, so the cipher's own loop gets fresh ones too: one in cache is 15 % faster.
    raw_records = iter([cipher.encrypt(nonce, chunk, CONTEXT) for _ in range(CHUNKS * ROUNDS)])
    records = iter([sealer_for_opening.seal(chunk, CONTEXT) for _ in range(CHUNKS * ROUNDS)])

    def raw_seal() -> None:
        for _ in range(CHUNKS):
            cipher.encrypt(nonce, chunk, CONTEXT)

    def seal() -> None:
        for _ in range(CHUNKS):
            sealer.seal(chunk, CONTEXT)

    def raw_open() -> None:
        for _ in range(CHUNKS):
            cipher.decrypt_into(nonce, next(raw_records), CONTEXT, out)

    def open_into() -> None:
        for _ in range(CHUNKS):
            opener.open_into(next(records), CONTEXT, out)

    return {"raw_seal": raw_seal, "seal": seal, "raw_open": raw_open, "open": open_into}


def measure(aead: Aead) -> dict[str, float]:
    """Throughput of each loop in GB/s, and the two ratios."""
    best_s: dict[str, float] = {}
    timed = loops(aead)
    for _ in range(ROUNDS):
        for name, loop in timed.items():
            started = time.perf_counter()
            loop()
            best_s[name] = min(best_s.get(name, float("inf")), time.perf_counter() - started)
    result = {f"{name}_gb_per_s": CHUNKS * CHUNK_BYTES / wall_s / 1e9 for name, wall_s in best_s.items()}
    result["seal_ratio"] = best_s["raw_seal"] / best_s["seal"]
    result["open_ratio"] = best_s["raw_open"] / best_s["open"]
    return result


def main() -> None:
    """Print the table and the JSON line."""
    results = {aead.value: measure(aead) for aead in Aead}
    for name, result in results.items():
        print(name)
        for side in ("seal", "open"):
            ours, raw, ratio = (
                result[key] for key in (f"{side}_gb_per_s", f"raw_{side}_gb_per_s", f"{side}_ratio")
            )
            print(f"  {side:<5} {ours:6.2f} GB/s   bare cipher {raw:6.2f} GB/s   ratio {ratio:.3f}")
    rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in results.items()}
    print(json.dumps({"chunk_bytes": CHUNK_BYTES, "tag_bytes": TAG_BYTES, **rounded}))


if __name__ == "__main__":
    main()
