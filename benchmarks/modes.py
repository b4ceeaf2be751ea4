"""Quality of the modes on a real task: how much of full LoRA's gain each keeps, and what it moves.

SmolLM2-135M-Instruct on a dictionary (`jargon.py ... chat`): conversations in the tokenizer's own chat
template cut to 128 tokens, three epochs, batches of 16 or a mode's own, LoRA on all linears of the blocks
that stay at the edge, AdamW, cosine schedule with 30 warm-up steps, loss on the answer only. Everything runs
in one process: the whole model with the real codecs at both cuts, forward and backward, which is what the
split model computes (tests/exactness). `side` takes the edge's own ladder and a projection that `tightbeam
serve` fitted. bf16 autocast.

    PYTHONPATH=. python benchmarks/modes.py --model FOLDER --data FOLDER --modes full,ushape-4:4 --seeds 0,1,2

Ranks and learning rates belong to a mode. They were chosen among several with seed 0 and `--validate`, which
keeps the last 200 training texts apart and judges by those. Prints one JSON line per mode and seed: loss in
nats per learned token before and after, and the bytes that cross over the whole run per token of the data
set. `--summary FILES` joins such lines into the tables of docs/modes.md.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.modes_job import Job, Mode, job_options

SMALL: dict[str, Any] = {"batch": 4, "dropout": 0.2, "noise": 0.2}
# "wide": eight or twelve blocks at rank 64 have about as many parameters as thirty at rank 16
MODES = {
    "full": Mode(whole=True, lr=7e-4),
    "full-dropout": Mode(whole=True, lr=1e-3, dropout=0.2),
    "ushape-2:2": Mode(bottom=2, top=2),
    "ushape-4:4": Mode(top=4),
    "ushape-4:4-wide": Mode(top=4, rank=64, lr=1e-3),
    "ushape-4:4-wide-int8": Mode(top=4, activations="int8", gradients="int8", rank=64, lr=1e-3),
    "ushape-4:4-wide-int4-int8": Mode(top=4, activations="int4", gradients="int8", rank=64, lr=1e-3),
    "ushape-4:8": Mode(top=8),
    "freeze-4:8-half": Mode(top=8, freeze_after=0.5),
    "freeze-4:8-half-wide": Mode(top=8, freeze_after=0.5, rank=64, lr=1e-3),
    "freeze-4:8-half-wide-int4-int8": Mode(
        top=8, activations="int4", gradients="int8", freeze_after=0.5, rank=64, lr=1e-3
    ),
    "freeze-4:8-half-small": Mode(top=8, freeze_after=0.5, rank=64, lr=5e-4, **SMALL),
    "freeze-4:8-half-small-int4-int8": Mode(
        top=8, activations="int4", gradients="int8", freeze_after=0.5, rank=64, lr=5e-4, **SMALL
    ),
    "freeze-4:8-one": Mode(top=8, freeze_after=1.0),
    "freeze-4:8-one-wide": Mode(top=8, freeze_after=1.0, rank=64, lr=1e-3),
    "top-8": Mode(top=8, freeze_after=0.0),
    "top-8-wide": Mode(top=8, freeze_after=0.0, rank=64, lr=1e-3),
    "top-8-wide-int4": Mode(top=8, activations="int4", freeze_after=0.0, rank=64, lr=1e-3),
    "top-8-noisy": Mode(top=8, freeze_after=0.0, rank=64, lr=1e-3, dropout=0.2, noise=0.2),
    "top-8-noisy-int4": Mode(
        top=8, activations="int4", freeze_after=0.0, rank=64, lr=1e-3, dropout=0.2, noise=0.2
    ),
    "top-12": Mode(top=12, freeze_after=0.0),
    "side-8": Mode(top=8, taps=8),
    "side-12": Mode(top=12, taps=8, lr=1e-3),
    "side-12-bypass": Mode(top=12, taps=0, lr=1e-3),
    "side-12-backbone": Mode(top=12, taps=8, lr=1e-3, from_backbone=True),
    "side-2-ladder": Mode(top=2, taps=8, freeze_after=0.0, lr=1e-3),  # the bottom is not trained
    "side-2-ladder-backbone": Mode(top=2, taps=8, freeze_after=0.0, lr=1e-3, from_backbone=True),
    "side-12-int4": Mode(top=12, activations="int4", taps=8, lr=1e-3),
}


def main() -> None:
    """Train what was asked, or summarise."""
    options = job_options()
    options.add_argument("--modes", default=",".join(MODES))
    options.add_argument("--projection", type=Path, help="fitted by tightbeam serve, for side")
    options.add_argument("--summary", type=Path, nargs="+")
    arguments = options.parse_args()
    if arguments.summary:
        summarise(arguments.summary)
        return
    for name in arguments.modes.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            mode = MODES[name]
            if mode.taps is None:
                job = Job(arguments, mode, seed)
            else:  # needs the edge's packages
                from benchmarks.modes_side import SideJob

                job = SideJob(arguments, mode, seed)
            row: dict[str, Any] = {"mode": name, "seed": seed, "rank": mode.rank, "lr": job.lr}
            row["data"] = arguments.data.name
            row |= {"max_tokens": arguments.max_tokens, "epochs": job.epochs, "validate": arguments.validate}
            width, tap_size = job.model.config.hidden_size, getattr(job, "tap_size", 0)
            crossed = mode.bytes_per_token(job.epochs, width, tap_size)
            print(json.dumps(row | job.run() | {"bytes_per_token": round(crossed, 1)}), flush=True)


def summarise(files: list[Path]) -> None:
    """Print one JSON line per task and mode: mean and spread over seeds."""
    tasks: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            tasks[row["data"], row["max_tokens"], row["epochs"]][row["mode"]].append(row)
    for (data, max_tokens, epochs), modes in tasks.items():
        full, before = (statistics.mean(row[which] for row in modes["full"]) for which in ("loss", "before"))
        for mode, rows in sorted(modes.items(), key=lambda item: statistics.mean(r["loss"] for r in item[1])):
            shares = [(before - row["loss"]) / (before - full) for row in rows]
            found = {
                "data": data,
                "max_tokens": max_tokens,
                "epochs": epochs,
                "mode": mode,
                "eval_loss": round(statistics.mean(row["loss"] for row in rows), 4),
                "share_of_full_lora_gain": round(statistics.mean(shares), 4),
                "spread": round(max(shares) - min(shares), 4),
                "seeds": len(rows),
                "rank": rows[0]["rank"],
                "lr": rows[0]["lr"],
                "bytes_per_token": rows[0]["bytes_per_token"],
            }
            print(json.dumps(found))


if __name__ == "__main__":
    main()
