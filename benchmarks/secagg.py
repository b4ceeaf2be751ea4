"""What secure aggregation costs, in bytes and seconds: `python benchmarks/secagg.py [--quick]`.

Three tables. Masks: milliseconds per million values and peer, ours (AES-256-CTR) beside the generator of
Flower's SecAgg+ (numpy's RandomState under a 32-bit seed), interleaved in the same process, best of the
rounds. Rounds: every exchange of a whole round in memory, at 10 and at 100 clients of a million values each,
a tenth of the clients gone before they send their vector; all share this machine, one after the other. Bytes:
what each client sends and gets, against the plain float32 vector. One thread. The last line is JSON.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from tightbeam.federation.secagg import FixedPoint, Plan, SecAggClient, SecAggServer
from tightbeam.federation.secagg.masks import add_mask, ring_dtype

VALUES = 1_000_000
ROUNDS = 15
Rows = dict[str, dict[str, float]]  # by exchange
EXCHANGES = ("keys", "shares", "masked", "consent", "unmask")
# flwr 1.41 SecAgg+, one client of three with a million float32 values, counted as serialised messages.
FLOWER_UP_BYTES, FLOWER_DOWN_BYTES = 8_000_474, 4_001_534


def best_ms(loops: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best wall time of each loop, interleaved so that a noisy machine disturbs all alike."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, loop in loops.items():
            started = time.perf_counter()
            loop()
            best[name] = min(best.get(name, float("inf")), 1e3 * (time.perf_counter() - started))
    return best


def masking(rounds: int) -> dict[str, float]:
    """Milliseconds to add one peer's mask to a million values."""
    seed = os.urandom(32)
    narrow, wide = (np.zeros(VALUES, ring_dtype(bits)) for bits in (32, 64))
    theirs = np.zeros(VALUES, np.int64)

    def flower() -> None:
        np.add(theirs, pseudo_rand_gen(seed, 1 << 32, [(VALUES,)])[0], out=theirs)

    return best_ms(
        {
            "ring32_ms": lambda: add_mask(narrow, seed),
            "ring64_ms": lambda: add_mask(wide, seed),
            "flower_ms": flower,
        },
        rounds,
    )


@dataclass
class Cost:
    """One exchange: bytes of a mean client, seconds of a mean client and of the server."""

    up_bytes: list[int] = field(default_factory=list)
    down_bytes: list[int] = field(default_factory=list)
    client_s: list[float] = field(default_factory=list)
    server_s: float = 0.0

    def row(self) -> dict[str, float]:
        """Means over the clients that took part."""
        return {
            "up_bytes": round(float(np.mean(self.up_bytes))),
            "down_bytes": round(float(np.mean(self.down_bytes))),
            "client_s": float(np.mean(self.client_s)),
            "server_s": self.server_s,
        }


def one_round(clients: int, size: int, ring_bits: int) -> Rows:
    """Run a round with a tenth of the clients gone before the vectors; check its sum."""
    names = [f"client-{number:03d}" for number in range(clients)]
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    roster = {name: key.public_key() for name, key in identities.items()}
    plan = Plan(
        federation="benchmark",
        round=1,
        model_sha256=hashlib.sha256(b"adapter").digest(),
        terms_sha256=hashlib.sha256(b"scenario").digest(),
        participants=tuple(names),
        threshold=2 * clients // 3 + 1,
        min_cohort=clients // 2,
        size=size,
        encoding=FixedPoint.fitting(1.0, 100, clients, ring_bits),
    )
    values = np.random.default_rng(0).uniform(-1, 1, size)
    server = SecAggServer(plan, roster)
    members = {name: SecAggClient(name, identities[name], roster) for name in names}
    costs = {exchange: Cost() for exchange in EXCHANGES}
    messages = server.open()
    for exchange, cost in costs.items():
        for name, message in messages.items():
            if exchange == "masked" and names.index(name) < clients // 10:
                continue
            client = members[name]
            started = time.perf_counter()
            if exchange == "masked":
                reply = client.mask(message, values, 100)
            else:
                step = {"keys": client.join, "shares": client.share, "consent": client.consent}
                reply = step.get(exchange, client.unmask)(message)
            replied = time.perf_counter()
            server.receive(name, reply)
            cost.server_s += time.perf_counter() - replied
            cost.client_s.append(replied - started)
            cost.up_bytes.append(len(reply))
            cost.down_bytes.append(len(message))
        started = time.perf_counter()
        if exchange != "unmask":
            messages = server.advance()
        else:
            error = float(np.abs(server.finish().mean - values).max())
        cost.server_s += time.perf_counter() - started
    assert error <= plan.encoding.error_bound
    return {exchange: cost.row() for exchange, cost in costs.items()}


def print_round(
    clients: int, size: int, ring_bits: int, rows: dict[str, dict[str, float]]
) -> dict[str, float]:
    """Print one round's table and return its totals."""
    total = {key: sum(row[key] for row in rows.values()) for key in rows["keys"]}
    plain = 4 * size
    print(f"\n{clients} clients, {size:,} values, ring of {ring_bits} bits, {clients // 10} dropped out")
    print(f"  {'exchange':<9}{'up B':>12}{'down B':>12}{'client s':>11}{'server s':>11}")
    for exchange, row in (rows | {"total": total}).items():
        line = f"{row['up_bytes']:>12,.0f}{row['down_bytes']:>12,.0f}"
        print(f"  {exchange:<9}{line}{row['client_s']:>11.3f}{row['server_s']:>11.3f}")
    overhead = total["up_bytes"] + total["down_bytes"] - plain
    print(f"  up, against {plain:,} B in float32: {total['up_bytes'] / plain:.3f}x; added: {overhead:,.0f} B")
    return total | {"values": size, "up_factor": total["up_bytes"] / plain, "added_bytes": overhead}


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the values, for a smoke test")
    quick = parser.parse_args().quick
    masks = masking(3 if quick else ROUNDS)
    print("masking a million values, per peer, best of the rounds (ours adds as it goes)")
    print(f"  AES-256-CTR, 32-bit ring {masks['ring32_ms']:8.2f} ms   4 B a value, 256-bit seed")
    print(f"  AES-256-CTR, 64-bit ring {masks['ring64_ms']:8.2f} ms   8 B a value, 256-bit seed")
    print(f"  Flower's pseudo_rand_gen {masks['flower_ms']:8.2f} ms   8 B a value,  32-bit seed")
    result: dict[str, object] = {"masking": {name: round(value, 3) for name, value in masks.items()}}
    shrink = 100 if quick else 1
    size = VALUES // shrink
    for clients in (10, 100):
        for ring_bits in (32, 64):
            totals = print_round(clients, size, ring_bits, one_round(clients, size, ring_bits))
            key = f"clients{clients}_ring{ring_bits}"
            result[key] = {name: round(value, 4) for name, value in totals.items()}
    print(
        "\nFlower's SecAgg+ (flwr 1.41, earlier measurement, 3 clients, a million values, 4 exchanges): "
        f"{FLOWER_UP_BYTES:,} B up and {FLOWER_DOWN_BYTES:,} B down in the exchange of the vector"
    )
    result["flower_secaggplus"] = {"up_bytes": FLOWER_UP_BYTES, "down_bytes": FLOWER_DOWN_BYTES}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
