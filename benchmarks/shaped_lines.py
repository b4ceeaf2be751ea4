"""The model of virtual time against real waiting: steps over lines that are as slow as their profiles say.

One client per network profile trains by `tightbeam simulate --shape`, so its steps go through a relay that
holds back bytes for the profile's bandwidth and round trip (`simulations/shaping.py`). Measured is what the
edge waited for its steps beyond the cloud's own time, modelled what `NetworkProfile.seconds` makes of their
counted bytes and round trips. Loss caps the rate on both sides alike, so it is not tested.

    python benchmarks/shaped_lines.py --model FOLDER

Prints a table and a JSON line.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from tightbeam.edge.report.meter import read_ledger
from tightbeam.federation.profiles import NETWORKS
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.simulations.experiment import run_scenario

_TEXT = "The bytes of this text cross a line of known bandwidth, there and back again. "


def experiment(model: Path, folder: Path, steps: int, rounds: int) -> Scenario:
    """One client on each network, each a group of its own."""
    data = folder / "texts.jsonl"
    rows = [{"prompt": f"{number}?\n", "completion": _TEXT * (2 + number % 5)} for number in range(96)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return scenario_from_mapping(
        {
            "backbone": str(model),
            "clients": len(NETWORKS),
            "rounds": rounds,
            "threads": 1,
            "data": {"source": str(data), "max_length": 128},
            "client": {"cut": "1:1", "r": 4},
            "groups": {name: {"clients": 1, "network": name} for name in NETWORKS},
            "train": {"steps": steps, "batch_size": 4},
            "output": {"dir": str(folder), "name": "shaped"},
        }
    )


def main() -> None:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description="Shaped lines against the model of virtual time.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scenario = experiment(arguments.model, Path(name), arguments.steps, arguments.rounds)
        page = run_scenario(scenario, shape=True, console=Console(quiet=True))
        found = json.loads((page.parent / "federation.json").read_text(encoding="utf-8"))
        rows = [row for row in read_ledger(page.parent / "ledger.jsonl") if row.get("status") == "ok"]
    result: list[dict[str, Any]] = []
    print("| network | MB | steps | modelled, s | measured, s | measured / modelled |")
    print("|---|---|---|---|---|---|")
    for line, profile in zip(found["lines"], scenario.profiles(), strict=True):
        own = [row for row in rows if row["client"] == profile.name]
        moved = sum(row["wire_up_bytes"] + row["wire_down_bytes"] for row in own)
        steps = sum(row["steps"] for row in own)
        ratio = line["measured_s"] / line["virtual_s"]
        modelled, measured = f"{line['virtual_s']:.2f}", f"{line['measured_s']:.2f}"
        print(f"| {line['group']} | {moved / 1e6:.1f} | {steps} | {modelled} | {measured} | {ratio:.3f} |")
        result.append(line | {"moved_bytes": moved, "steps": steps, "ratio": round(ratio, 4)})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
