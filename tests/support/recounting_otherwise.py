"""What an experiment would have cost otherwise, worked out again from recounted rows."""

from collections.abc import Sequence
from typing import Any

from support.recounting_rows import Clients, Row
from tightbeam.common.wire.codecs import codec

__all__ = ["PER_GIGABYTE", "PER_KILOWATT_HOUR", "PER_PETAFLOP", "alternatives", "money"]

PER_GIGABYTE, PER_PETAFLOP, PER_KILOWATT_HOUR = 0.09, 0.005, 0.30
_MOVED = ("wire_up_bytes", "wire_down_bytes", "adapter_up_bytes", "adapter_down_bytes", "weight_bytes")


def money(moved_bytes: float, cloud_flops: float, joules: float) -> float:
    """By the default prices."""
    traffic = moved_bytes / 1e9 * PER_GIGABYTE
    return traffic + cloud_flops / 1e15 * PER_PETAFLOP + joules / 3.6e6 * PER_KILOWATT_HOUR


def alternatives(clients: Clients) -> list[Row]:
    """The report's table, without its rules."""
    work, blocks = clients.work, clients.backbone["num_blocks"]
    trained, evaluated = clients.of("client_round"), clients.of("client_eval")
    wire, up, down, weights = (
        _sum(work, *names) for names in (_MOVED[:2], _MOVED[2:3], _MOVED[3:4], _MOVED[4:])
    )
    framed = wire / _sum(work, "payload_up_bytes", "payload_down_bytes")
    whole = clients.backbone["weight_bytes"]
    everywhere = whole * len({row["client"] for row in work})
    learned, tested = _sum(trained, "tokens"), _sum(evaluated, "tokens")
    flops = whole // 4 * (4 * learned + 2 * tested)
    once = {name: _once(clients, name) for name in clients.options}
    ladders, folds = clients.flower.ladders, clients.flower.folds
    lora = _sum(trained, "adapter_down_bytes")
    lora -= sum(n for found in (ladders, folds) for key, n in found.items() if key[0] == "client_round")
    shared = sum(_shared_blocks(clients.options[row["client"]]) for row in trained)
    whole_adapters = lora / max(shared, 1) * blocks * (2 * len(trained) + len(evaluated))
    adapters = {mode: _adapters(clients, mode) for mode in ("ushape", "top")}
    edge, cloud = _sum(work, "edge_flops"), _sum(work, "cloud_flops")
    both = _as_ushape(clients)
    trunk = {name: (whole - clients.held(name)) // 4 for name in once}
    once_flops = sum(2 * count * trunk[name] for name, count in once.items())

    def crossed(name: str, rows: float) -> float:
        row_bytes = codec(name).num_bytes((1000, clients.backbone["hidden_size"])) / 1000
        return float(rows * row_bytes * framed)

    found: list[tuple[Any, ...]] = [
        ("as it was", wire, up + down, weights, edge, cloud),
        ("central LoRA", 4 * sum(once.values()), 0, 0, 0, flops),
        ("whole model at the edge", 0, whole_adapters, everywhere, flops, 0),
        *(
            (f"ushape, {c}", crossed(c, 4 * learned + 2 * tested), adapters["ushape"], weights, *both)
            for c in ("fp32", "bf16", "int8")
        ),
        (
            "top, bf16, cached",
            crossed("bf16", 2 * sum(once.values())),
            adapters["top"],
            weights,
            both[0],
            once_flops,
        ),
    ]
    keys = ("name", "activation_bytes", "adapter_bytes", "weight_bytes", "edge_flops", "cloud_flops")
    rows: list[Row] = [dict(zip(keys, values, strict=True)) for values in found]
    for row in rows:
        row["measured"] = row["name"] == "as it was"
        row["joules"] = _sum(work, "joules") / edge * row["edge_flops"]
        row["money"] = money(sum(row[key] for key in keys[1:4]), row["cloud_flops"], row["joules"])
    return rows


def _once(clients: Clients, name: str) -> float:
    """Tokens of a client's examples; of those that it trained on, at least as many as it has seen."""
    trained = [row for row in clients.of("client_round", client=name) if row["steps"]]
    evaluated = [row for row in clients.of("client_eval", client=name) if row["status"] == "ok"]
    size = clients.scenario["train"]["batch_size"]
    passes = sum(row["steps"] * size / row["examples"] for row in trained if row["examples"])
    held_out = evaluated[0]["tokens"] if evaluated else 0
    return float(_sum(trained, "tokens") / max(passes, 1) + held_out)


def _shared_blocks(options: Row) -> int:
    bottom, top = map(int, str(options["cut"]).split(":"))
    bare = options["mode"] == "top" or (options["mode"] == "side" and not options["side"]["adapt_bottom"])
    return {"none": 0, "top": top, "all": top if bare else bottom + top}[options["share"]]


def _adapters(clients: Clients, mode: str) -> int:
    """Adapters of the blocks that clients had shared in another mode, as large as what they did share."""
    freeze, total = clients.scenario["train"]["freeze_bottom_after"], 0.0
    for row in clients.work:
        options = clients.options[row["client"]]
        held, wanted, top = (_shared_blocks(options | {"mode": m}) for m in (options["mode"], mode, "top"))
        down = row["adapter_down_bytes"]
        lora = down - clients.flower.ladders.get((row["row"], row["round"], row["client"]), 0)
        handed_in = min(held, top) if freeze and row["round"] > freeze else held
        if held and down:
            total += lora / held * wanted
            total += row["adapter_up_bytes"] * lora / down / handed_in * wanted
    return round(total)


def _as_ushape(clients: Clients) -> tuple[float, float]:
    """Edge and cloud operations had every step crossed both ways: counted where they did."""
    freeze, edge, cloud = clients.scenario["train"]["freeze_bottom_after"], 0, 0
    for row in clients.work:
        after = row["round"] - (row["row"] == "client_round")
        if clients.options[row["client"]]["mode"] == "ushape" and not (freeze and after >= freeze):
            edge, cloud = edge + row["edge_flops"], cloud + row["cloud_flops"]
        else:
            held, whole = clients.held(row["client"]), clients.backbone["weight_bytes"]
            times = {"client_round": 4, "client_eval": 2}[row["row"]] * row["tokens"]
            edge, cloud = edge + times * (held // 4), cloud + times * ((whole - held) // 4)
    return edge, cloud


def _sum(rows: Sequence[Row], *names: str) -> Any:
    return sum(row[name] for row in rows for name in names)
