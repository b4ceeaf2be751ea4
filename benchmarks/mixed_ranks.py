"""Federated LoRA with mixed ranks on real texts: what each aggregator makes of the same clients.

SmolLM2-135M, cut 4:4 (adapters on all linears of the first and last four blocks), nine clients of ranks 4, 8
and 16, three of each, on the Jargon File (`jargon.py`). Its training entries are put into twelve topics by
their words and dealt out by Dirichlet(0.3) over the topics, so clients differ in topics and sizes. Each of
the rounds every client starts from the global adapter at its own rank and takes a few AdamW steps; then the
aggregators of `tightbeam.federation.math` combine them, weighted by examples.

    PYTHONPATH=common:simulations python benchmarks/mixed_ranks.py --model FOLDER --data FOLDER \
        --strategies flora-principal,zeropad --seeds 0,1,2

`fedit-R` gives all clients rank R: a reference, since fedit refuses mixed ranks. `ffa-folded` is ffa whose
clients fold the directions beyond their rank. Each strategy has its own learning rate, chosen with seed 100
on 256 training entries that nobody trains on; the table is of other seeds and of the 256 evaluation entries.
One JSON line per run. `--summary FILES` joins them into the lines of docs/data/mixed_ranks*.jsonl, and
`--table FILE` prints those as a table of docs/federation-math.md.

One process and the whole model, which is what the split one computes (tests/exactness), in bf16 autocast
where the device computes it fast. With a cut 0:m, as in mode top, each text goes through the other blocks
once; that and smaller numbers (`--clients 6 --batch 2 --max-tokens 64 --limit 128`) make it fit a CPU. The
clients of a round train side by side in one batch, each with its own slice of every adapter. Slices are as
wide as the largest rank: beyond a client's own are zeros, or what it has folded, and they do not learn.
"""

import argparse
import json
import math
import random
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tightbeam.federation.math import (
    Aggregate,
    LoraAdapter,
    Update,
    aggregator_named,
    beyond,
    fold,
    kept,
    on_shared_A,
    parse_adapter,
    plus,
    principal,
)
from tightbeam.simulations.partition import dirichlet

SCALE = 2.0
RANKS = [4, 8, 16]
TOPICS, ALPHA, MIN_EXAMPLES, NUM_VALIDATION = 12, 0.3, 32, 256
STRATEGIES = [
    "flora-principal", "flora-fresh", "ffa-folded", "ffa", "flexlora", "hetlora", "zeropad",
    "fedit-4", "fedit-8", "fedit-16",
]  # fmt: skip
FOLDED = ("flora-principal", "ffa-folded")  # clients fold the directions that they do not wear
SEARCH_SEED = 100
PREFIX = "base_model.model."

Example = tuple[list[int], int]  # token ids, length of the prompt
Arrays = dict[str, NDArray[np.float32]]


class StackedLora(nn.Module):
    """A frozen linear layer and the factors of K clients: row block k of the batch goes through the k-th."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.original_OI = base.weight.detach().cpu().numpy().copy()
        self.wear([np.zeros((1, base.in_features))], [np.zeros((base.out_features, 1))])

    def wear(self, A: Sequence[NDArray[Any]], B: Sequence[NDArray[Any]]) -> None:
        """Take the factors of K clients, A [r_k, in] and B [out, r_k]; the optimizer is to start afresh."""
        rank, like = max(len(one) for one in A), self.base.weight
        padded_A = np.stack([np.pad(one, ((0, rank - len(one)), (0, 0))) for one in A])
        padded_B = np.stack([np.pad(one, ((0, 0), (0, rank - one.shape[1]))) for one in B])
        self.A_KRI = nn.Parameter(torch.from_numpy(padded_A).to(like))
        self.B_KOR = nn.Parameter(torch.from_numpy(padded_B).to(like))

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return W x + s B_k A_k x."""
        rows_KNI = x_BTI.reshape(len(self.A_KRI), -1, x_BTI.shape[-1])
        added_KNO = SCALE * (rows_KNI @ self.A_KRI.mT @ self.B_KOR.mT)
        out_BTO: Tensor = self.base(x_BTI)
        return out_BTO + added_KNO.reshape(out_BTO.shape)


class Federation:
    """The backbone with stacked adapters, and the data, for as many runs as one likes."""

    def __init__(
        self,
        model: Path,
        data: Path,
        device: str,
        cut: str,
        limit: int | None,
        *,
        max_tokens: int = 128,
        bf16: bool = False,
    ) -> None:
        self.device, self.bf16 = torch.device(device), bf16
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts, examples = _examples(data / "train.jsonl", tokenizer, max_tokens)
        held = min(NUM_VALIDATION, len(examples) // 4)
        self.validation = examples[-held:][:limit]
        self.train, self.topics = examples[:-held], topics_of(texts[:-held], TOPICS)
        self.test = _examples(data / "eval.jsonl", tokenizer, max_tokens)[1][:limit]
        backbone: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model = backbone.to(self.device).requires_grad_(False)
        bottom, top = map(int, cut.split(":"))
        self.layers = self._adapt(bottom, top)
        self.cached: dict[tuple[int, ...], Tensor] = {}
        if not bottom:
            self._keep_what_crosses(top, [*self.train, *self.validation, *self.test])

    def _keep_what_crosses(self, top: int, examples: Sequence[Example]) -> None:
        """With nothing to train below the trunk, as in mode top, each text goes through it once."""
        whole, crossed = self.model.model, list[Tensor]()
        blocks = whole.layers
        whole.layers = blocks[:-top]
        hook = whole.norm.register_forward_pre_hook(lambda norm, inputs: crossed.append(inputs[0]))
        texts = sorted((ids for ids, _ in examples), key=len)
        for i in range(0, len(texts), 32):
            batch = [torch.tensor(ids, device=self.device) for ids in texts[i : i + 32]]
            with torch.no_grad(), self._autocast():
                whole(input_ids=nn.utils.rnn.pad_sequence(batch, batch_first=True), use_cache=False)
            for ids, hidden in zip(texts[i : i + 32], crossed.pop(), strict=True):
                self.cached[tuple(ids)] = hidden[: len(ids)].clone()
        hook.remove()
        whole.layers = blocks[-top:]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _adapt(self, bottom: int, top: int) -> dict[str, StackedLora]:
        blocks = self.model.model.layers
        edge = [*range(bottom), *range(len(blocks) - top, len(blocks))]
        layers = {}
        for index in edge:
            for name, module in list(blocks[index].named_modules()):
                if isinstance(module, nn.Linear):
                    layers[f"{PREFIX}model.layers.{index}.{name}"] = stacked = StackedLora(module)
                    blocks[index].set_submodule(name, stacked)
        return layers

    def fresh(self, rank: int, seed: int) -> LoraAdapter:
        """Random A and zero B."""
        probe = {}
        for name, layer in self.layers.items():
            probe[f"{name}.lora_A.weight"] = np.zeros((1, layer.base.in_features), np.float32)
            probe[f"{name}.lora_B.weight"] = np.zeros((layer.base.out_features, 1), np.float32)
        return parse_adapter(probe, SCALE, "the server").restarted(rank, seed)

    def wear(self, states: Sequence[Arrays], ranks: Sequence[int] = ()) -> None:
        """Dress the model in the adapters of as many clients as there are states.

        Given ranks, directions beyond a client's own count but do not learn, as if it had folded them.
        """
        widest = max(len(array) for state in states for name, array in state.items() if ".lora_A." in name)
        limits_K = torch.tensor(ranks or [widest] * len(states))
        self.learns_KR = (torch.arange(widest) < limits_K[:, None]).to(self.device)
        for name, layer in self.layers.items():
            A, B = ([state[f"{name}.lora_{factor}.weight"] for state in states] for factor in "AB")
            layer.wear(A, B)

    def undress(self, rank: int, client: int) -> Arrays:
        """What one client has now, at its rank, under PEFT's names."""
        arrays = {}
        for name, layer in self.layers.items():
            A_RI, B_OR = layer.A_KRI[client, :rank], layer.B_KOR[client, :, :rank]
            arrays[f"{name}.lora_A.weight"] = A_RI.detach().cpu().numpy()
            arrays[f"{name}.lora_B.weight"] = B_OR.detach().cpu().numpy()
        return arrays

    def fold(self, stacked: LoraAdapter) -> None:
        """Add an update to the weights, as each edge does under FLoRA."""
        for name, module in stacked.modules.items():
            layer = self.layers[name]
            weight_OI = fold(layer.base.weight.cpu().numpy(), module)
            layer.base.weight.data = torch.from_numpy(weight_OI).to(self.device)

    def unfold(self) -> None:
        """Make the weights those of the backbone again."""
        for layer in self.layers.values():
            layer.base.weight.data = torch.from_numpy(layer.original_OI.copy()).to(self.device)

    def losses(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Loss of every learned token, nats, and the row that it is in."""
        length = max(len(ids) for ids, _ in examples)
        input_ids = torch.zeros(len(examples), length, dtype=torch.int64)
        learned = torch.zeros(len(examples), length, dtype=torch.bool)
        for row, (ids, prompt) in enumerate(examples):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            learned[row, prompt : len(ids)] = True
        input_ids, learned = input_ids.to(self.device), learned.to(self.device)
        inputs = {"input_ids": input_ids}
        if self.cached:
            crossed = [self.cached[tuple(ids)] for ids, _ in examples]
            inputs = {"inputs_embeds": nn.utils.rnn.pad_sequence(crossed, batch_first=True)}
        with self._autocast():
            hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[:, :-1][learned[:, 1:]])
        targets = input_ids[:, 1:][learned[:, 1:]]
        return cross_entropy(logits.float(), targets, reduction="none"), learned[:, 1:].nonzero()[:, 0]

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], state: Arrays) -> float:
        """Mean loss over the learned tokens under one adapter."""
        self.wear([state])
        parts = [self.losses(examples[i : i + 64])[0] for i in range(0, len(examples), 64)]
        return float(torch.cat(parts).mean())

    @cached_property
    def before(self) -> float:
        """Loss of the backbone itself on the evaluation entries."""
        self.unfold()
        return round(self.evaluate(self.test, self.fresh(1, 0).state(SCALE)), 4)

    def local_steps(self, batches: Sequence[Sequence[list[int]]], lr: float, *, only_B: bool) -> None:
        """Every client's AdamW steps, side by side; `batches` are rows of the data by step and client."""
        assert len({len(rows) for clients in batches for rows in clients}) == 1
        A_learns, B_learns = self.learns_KR[..., None], self.learns_KR[:, None]
        factors = [p for x in self.layers.values() for p in ((x.A_KRI, A_learns), (x.B_KOR, B_learns))]
        trained = factors[1::2] if only_B else factors
        optimizer = torch.optim.AdamW([parameter for parameter, _ in trained], lr=lr, weight_decay=0.0)
        for clients in batches:
            losses, rows = self.losses([self.train[row] for client in clients for row in client])
            owner = rows // len(clients[0])
            # each client's own mean: gradients of slices do not meet
            (losses / torch.bincount(owner, minlength=len(clients))[owner]).sum().backward()
            squares_K = torch.zeros(len(clients), device=self.device)
            for parameter, learns in trained:
                assert parameter.grad is not None
                parameter.grad *= learns
                squares_K += parameter.grad.square().flatten(1).sum(1)
            shrink_K = (1.0 / (squares_K.sqrt() + 1e-6)).clamp(max=1.0)
            for parameter, _ in trained:
                assert parameter.grad is not None
                parameter.grad *= shrink_K[:, None, None]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def run(
    federation: Federation,
    strategy: str,
    seed: int,
    lr: float,
    *,
    rounds: int,
    steps: int,
    batch: int,
    clients: int = 9,
) -> dict[str, Any]:
    """One federated experiment; losses of what clients of each rank have in the end."""
    name, _, variant = strategy.partition("-")
    same = int(variant) if variant.isdigit() else None
    ranks = [same or RANKS[k % len(RANKS)] for k in range(clients)]
    widest = max(ranks)
    rng = np.random.default_rng(seed)
    parts = dirichlet(federation.topics, len(ranks), ALPHA, MIN_EXAMPLES, rng)
    orders = [_order(part, random.Random(1000 * seed + k)) for k, part in enumerate(parts)]
    before = federation.before
    federation.unfold()
    learned, began_s = federation.fresh(widest, seed), time.perf_counter()
    error: list[float] = []
    for number in range(rounds):
        if strategy in FOLDED:
            federation.unfold()
            federation.fold(beyond(learned, widest))
        worn = [widest if strategy in FOLDED else rank for rank in ranks]
        federation.wear([learned.resized(rank, seed + number).state(SCALE) for rank in worn], ranks)
        batches = [[[next(order) for _ in range(batch)] for order in orders] for _ in range(steps)]
        federation.local_steps(batches, lr, only_B=name == "ffa")
        updates = [
            Update(f"client-{k}", len(parts[k]), federation.undress(rank, k), SCALE)
            for k, rank in enumerate(ranks)
        ]
        result = aggregator_named(name).aggregate(updates)
        if number == rounds - 1:
            error = [_error(result, None if strategy in FOLDED else rank) for rank in sorted(set(ranks))]
        if strategy == "flora-fresh":
            federation.fold(result.adapter)
            learned = federation.fresh(widest, seed + number + 1)
        elif strategy == "flora-principal":
            learned = principal(plus(kept(learned, updates), result.mean), widest, seed + number + 1)
        elif strategy == "ffa-folded":
            learned = on_shared_A(learned, updates, result.adapter)
        else:
            learned = result.adapter
    by_rank = {rank: learned.resized(rank).state(SCALE) for rank in sorted(set(ranks))}
    if strategy in FOLDED:
        federation.unfold()
        federation.fold(beyond(learned, widest))
        by_rank = dict.fromkeys(by_rank, learned.resized(widest).state(SCALE))
    held_out = federation.validation if seed == SEARCH_SEED else federation.test
    return {
        "strategy": strategy,
        "seed": seed,
        "lr": lr,
        "before": before,
        "rounds": rounds,
        "steps": steps,
        "batch": batch,
        "loss": _losses(federation, held_out, by_rank),
        "error": dict(zip(by_rank, error, strict=True)),
        "examples": [len(part) for part in parts],
        "seconds": round(time.perf_counter() - began_s, 1),
    }


def topics_of(texts: Sequence[str], count: int, iterations: int = 20) -> list[str]:
    """A topic for each text: spherical k-means over TF-IDF of words that are in 5 texts, at most a fifth."""
    words = [Counter(re.findall(r"[a-z]{3,}", text.lower())) for text in texts]
    frequency = Counter(word for text in words for word in text)
    kept = [word for word, n in sorted(frequency.items()) if 5 <= n <= len(texts) / 5]
    place = {word: index for index, word in enumerate(kept)}
    vectors = np.zeros((len(texts), len(kept)), np.float32)
    for row, text in enumerate(words):
        for word in text.keys() & place.keys():
            vectors[row, place[word]] = (1 + math.log(text[word])) * math.log(len(texts) / frequency[word])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    centres = vectors[np.random.default_rng(0).permutation(len(texts))[:count]]
    for _ in range(iterations):
        topic = (vectors @ centres.T).argmax(axis=1)
        sums = np.stack([vectors[topic == number].sum(axis=0) for number in range(len(centres))])
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    return [str(number) for number in topic]


def summarise(files: Sequence[Path]) -> list[dict[str, Any]]:
    """One row per strategy, best first: losses of the seeds at the rate that the search chose.

    A strategy that was only searched for has no loss.
    """
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines() if line[:1] == "{"]
    by_strategy: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        by_strategy[row["strategy"]].append(row)
    found = []
    for strategy, own in by_strategy.items():
        search = {row["lr"]: _mean(row["loss"].values()) for row in own if row["seed"] == SEARCH_SEED}
        runs = [row for row in own if row["seed"] != SEARCH_SEED]
        losses, ranks = [_mean(row["loss"].values()) for row in runs], own[0]["loss"] if runs else ()
        found.append(
            {
                "strategy": strategy,
                "loss": _mean(losses) if losses else None,
                "losses": losses,
                "by_rank": {r: _mean(row["loss"][r] for row in runs) for r in ranks},
                "error_by_rank": {r: _mean(row["error"][r] for row in runs) for r in ranks},
                "lr": runs[0]["lr"] if runs else min(search, key=lambda lr: search[lr]),
                "search": search,
                "seeds": [row["seed"] for row in runs],
                **{name: own[0][name] for name in ("before", "rounds", "steps", "batch")},
            }
        )
    return sorted(found, key=lambda row: (row["loss"] is None, row["loss"] or min(row["search"].values())))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/federation-math.md; "search" is the best loss of seed 100, on other entries."""
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    names = ["loss", *(f"seed {seed}" for seed in seeds), "rank 4", "rank 8", "rank 16", "error, rank 4 / 16"]
    names += ["search", "lr"]
    lines = [f"| | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        ranks = [f"{row['by_rank'][r]:.4f}" if r in row["by_rank"] else "" for r in ("4", "8", "16")]
        errors = [row["error_by_rank"].get(r) for r in ("4", "16")]
        error = " / ".join("-" if e is None else f"{e:.2g}" for e in errors)
        by_seed = dict(zip(row["seeds"], row["losses"], strict=True))
        losses = [f"{by_seed[seed]:.4f}" if seed in by_seed else "" for seed in seeds]
        loss = f"{row['loss']:.4f}" if row["losses"] else ""
        cells = [loss, *losses, *ranks, error, f"{min(row['search'].values()):.4f}", f"{row['lr']:g}"]
        lines.append(f"| {row['strategy']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _losses(
    federation: Federation, examples: Sequence[Example], by_rank: dict[int, Arrays]
) -> dict[int, float]:
    """Loss of each rank; those with the same state are evaluated once."""
    found: dict[int, float] = {}
    for state in by_rank.values():
        if id(state) not in found:
            found[id(state)] = round(federation.evaluate(examples, state), 4)
    return {rank: found[id(state)] for rank, state in by_rank.items()}


def _error(result: Aggregate, rank: int | None) -> float:
    return round(result.relative_error(None if result.folds else rank), 4)


def _order(rows: Sequence[int], rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(list(rows), len(rows))


def _mean(values: Any) -> float:
    return round(float(statistics.mean(values)), 4)


def _examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[list[str], list[Example]]:
    """Texts and token ids; entries without an answer within the limit are left out."""
    texts, examples = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt = len(tokenizer(record["prompt"])["input_ids"])
        ids = tokenizer(record["prompt"] + record["completion"])["input_ids"][:max_tokens]
        if len(ids) > prompt:
            texts.append(record["completion"])
            examples.append((ids, prompt))
    return texts, examples


def main() -> None:
    """Choose a learning rate for each strategy, then run its seeds; or summarise."""
    parser = argparse.ArgumentParser(description="Aggregators with mixed ranks on the Jargon File.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, help="folder written by jargon.py")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lrs", default="5e-4,1e-3,2e-3,4e-3")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="local steps per round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clients", type=int, default=9, help="their ranks are 4, 8, 16, 4, 8, ...")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest text")
    parser.add_argument("--cut", default="4:4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, default=None, help="evaluate on fewer examples")
    parser.add_argument("--summary", type=Path, nargs="+")
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    if arguments.summary:
        print("\n".join(json.dumps(row) for row in summarise(arguments.summary)))
        return
    if arguments.table:
        print(table([json.loads(line) for line in arguments.table.read_text().splitlines()]))
        return
    federation = Federation(
        arguments.model,
        arguments.data,
        arguments.device,
        arguments.cut,
        arguments.limit,
        max_tokens=arguments.max_tokens,
        bf16=arguments.device == "cuda" or bool(torch.cpu.get_capabilities().get("avx512_bf16")),
    )
    size = {name: getattr(arguments, name) for name in ("rounds", "steps", "batch", "clients")}
    for strategy in arguments.strategies.split(","):
        tried = {}
        for lr in map(float, arguments.lrs.split(",")):
            row = run(federation, strategy, SEARCH_SEED, lr, **size)
            tried[lr] = _mean(row["loss"].values())
            print(json.dumps(row), flush=True)
        for seed in map(int, arguments.seeds.split(",")):
            best = min(tried, key=lambda lr: tried[lr])
            row = run(federation, strategy, seed, best, **size)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
