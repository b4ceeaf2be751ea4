"""Where `train.freeze_bottom_after: auto` freezes on a real task, and what that costs against fixed points.

The task, its settings and its one process are those of `modes.py` (SmolLM2-135M on the Jargon File), cut 4:8
with nothing coded; the rule is the very file that the edge runs. The distance is the edge's: on the first 512
tokens or so of the training data, here in bf16. Rank, rate and batches are those of `recipes/freeze.yaml`.

    python -m benchmarks.freeze_rule --model FOLDER --data FOLDER --seeds 0,1,2

Prints a JSON line per look and one per run: after how many epochs the bottom was frozen, the loss in nats per
learned token, and bytes per token of the data set. `never` trains the bottom to the end; the looks of its
first epoch say where the rule would have frozen.
"""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from benchmarks.modes import MODES
from benchmarks.modes_job import Job, job_options
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

MODE = replace(MODES["freeze-4:8-half-small"], freeze_after=None)  # the recipe's rank, rate and batches


def _load_rule() -> ModuleType:
    """The edge's rule by its path: importing the package would need gRPC and more."""
    place = Path(__file__).parents[1] / "edge" / "tightbeam" / "edge" / "modes" / "settling.py"
    spec = importlib.util.spec_from_file_location("settling", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["settling"] = module  # where a dataclass looks up its own module
    spec.loader.exec_module(module)
    return module


class Watched:
    """A job that is looked at after every optimizer step, and frozen when its point says so."""

    def __init__(self, job: Job, point: str, rule: ModuleType) -> None:
        self.job, self.point, self.rule = job, point, rule
        self.per_epoch = len(list(job._batches())) // job.epochs
        self.settling = rule.Settling(self.per_epoch)
        self.frozen_at: int | None = None
        self.step = 0

    def run(self) -> dict[str, Any]:
        """Train; give the losses."""
        hook = register_optimizer_step_post_hook(lambda *_: self._after_step())
        try:
            found: dict[str, Any] = self.job.run()
        finally:
            hook.remove()
        return found

    def _after_step(self) -> None:
        self.step += 1
        if self.frozen_at is None and self._says_freeze():
            self.frozen_at = self.step
            self.job._freeze()

    def _says_freeze(self) -> bool:
        if self.point not in ("auto", "never"):
            return self.step >= float(self.point) * self.per_epoch
        would: bool = self.settling.says_freeze(self.step, self._distance)
        if self.settling.looks(self.step) and self.step < self.per_epoch:
            look = {
                "point": self.point,
                "seed": self.job.seed,
                "epochs": round(self.step / self.per_epoch, 3),
            }
            look |= {"distance": round(self.settling.looked[-1], 5), "freezes": would}
            print(json.dumps(look), flush=True)
        return would and self.point == "auto"

    @torch.no_grad()
    def _distance(self) -> float:
        now_ND = self._probe()
        with self.job.model.disable_adapter():
            start_ND = self._probe()
        return float(((now_ND - start_ND).norm(dim=1) / start_ND.norm(dim=1)).median())

    def _probe(self) -> Tensor:
        """What enters the trunk, `[N, D]`."""
        job, found = self.job, []
        job.model.eval()
        hook = job.up.register_forward_pre_hook(lambda _, args: found.append(args[0][0].float()))
        for ids, _ in job.train:
            ids_1N = torch.tensor([ids], device=job.device)
            job.up.keep_BT = job.down.keep_BT = torch.ones_like(ids_1N, dtype=torch.bool)
            with torch.autocast(job.device.type, torch.bfloat16):
                job.model(input_ids=ids_1N, use_cache=False)
            if sum(map(len, found)) >= self.rule.PROBE_TOKENS:
                break
        hook.remove()
        return torch.cat(found)


def main() -> None:
    """Train once per seed and point."""
    options = job_options()
    options.add_argument("--points", default="auto,0.25,0.5,1,never", help="when to freeze, in epochs")
    arguments = options.parse_args()
    rule = _load_rule()
    for seed in map(int, arguments.seeds.split(",")):
        for point in arguments.points.split(","):
            job = Job(arguments, MODE, seed)
            watched = Watched(job, point, rule)
            row: dict[str, Any] = {"point": point, "seed": seed, "lr": job.lr, **watched.run()}
            epochs = None if watched.frozen_at is None else watched.frozen_at / watched.per_epoch
            row["frozen_after_epochs"] = epochs
            crossed = replace(MODE, freeze_after=epochs).bytes_per_token(
                job.epochs, job.model.config.hidden_size
            )
            print(json.dumps(row | {"bytes_per_token": round(crossed, 1)}), flush=True)


if __name__ == "__main__":
    main()
