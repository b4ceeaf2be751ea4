"""One LoRA step split over two processes against the same step in one process with stock PEFT.

The cloud runs as its own process behind TLS and sealed records on loopback, every process with one torch
thread, all in float32 with the lossless codec. Split and local steps alternate within one run, so a drifting
machine moves both; the median ratio of neighbouring pairs is what counts. CPU seconds of both processes stand
beside it: they tell the same on a machine that others use too.

    python -m benchmarks.step_overhead --model FOLDER        # a converted SmolLM2, see `tightbeam demo`
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from benchmarks.serving import cloud_process
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tightbeam.common.identity.identities import init_certificates
from tightbeam.edge import connect

SHAPES = ((8, 128), (1, 128))  # batch, tokens
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Print a line per shape and the JSON summary last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cut", default="4:4")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each kind and shape")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        init_certificates(folder / "certs", clients=["edge"])
        secured = ("--identity", str(folder / "certs" / "cloud"))
        with (
            cloud_process(arguments.model, folder, *secured) as address,
            connect(address, identity=folder / "certs" / "edge", on_row=rows.append) as cloud,
        ):
            split = _adapted(cloud.load_model(arguments.cut, local_path=arguments.model), arguments.cut)
            whole = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
            local = _adapted(whole, arguments.cut)
            result: dict[str, float] = {}
            for batch, length in SHAPES:
                wall, cpu = _compare(split, local, batch, length, arguments.steps)
                result |= {f"ratio_{batch}x{length}": wall, f"cpu_ratio_{batch}x{length}": cpu}
    steps = [row for row in rows if row["row"] == "step"]
    payload = sum(row["payload_up_bytes"] + row["payload_down_bytes"] for row in steps)
    wire = sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in steps)
    hidden = cloud.card.hidden_size * 4
    transfers = payload / sum(row["tokens"] * hidden for row in steps if row["kind"] == "forward")
    result |= {
        "payload_transfers_per_step": round(transfers, 4),
        "wire_overhead": round(wire / payload - 1, 5),
    }
    print(
        f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}"
    )
    print(json.dumps(result))


def _compare(
    split: PeftModel, local: PeftModel, batch: int, length: int, num_steps: int
) -> tuple[float, float]:
    """Wall and CPU ratio split/local, medians over pairs of neighbouring steps."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(10, 40_000, (batch, length), generator=generator)
    order = (("split", split), ("local", local))
    wall_s: dict[str, list[float]] = {"split": [], "local": []}
    cpu_s: dict[str, list[float]] = {"split": [], "local": []}
    for step in range(num_steps + 1):
        for name, model in order if step % 2 else reversed(order):
            started_s, cpu_before_s = time.perf_counter(), _cpu_seconds()
            model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
            model.zero_grad()
            if step:  # the first step warms both up
                wall_s[name].append(time.perf_counter() - started_s)
                cpu_s[name].append(_cpu_seconds() - cpu_before_s)
    for name, values in wall_s.items():
        median_s = statistics.median(values)
        print(
            f"{batch}x{length} {name}: {median_s:.3f} s a step ({min(values):.3f} to {max(values):.3f}), "
            f"{batch * length / median_s:.0f} tok/s, {statistics.median(cpu_s[name]):.3f} CPU s"
        )
    wall, cpu = _ratio(wall_s), _ratio(cpu_s)
    print(f"{batch}x{length} split/local: wall {wall:.3f}, CPU {cpu:.3f}", flush=True)
    return round(wall, 4), round(cpu, 4)


def _ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(a / b for a, b in zip(seconds["split"], seconds["local"], strict=True))


def _cpu_seconds() -> float:
    """CPU time of this process and the cloud's."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children())]
    return sum(t.user + t.system for t in times)


def _adapted(model: PreTrainedModel, cut: str) -> PeftModel:
    bottom, top = map(int, cut.split(":"))
    num_blocks = model.config.num_hidden_layers
    layers = [*range(bottom), *range(num_blocks - top, num_blocks)]
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=PROJECTIONS, layers_to_transform=layers))
    assert isinstance(adapted, PeftModel)
    return adapted


if __name__ == "__main__":
    main()
