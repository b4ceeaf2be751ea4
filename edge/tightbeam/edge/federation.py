"""What one client does in one round: wear the global adapter, train some steps, hand back what it learned.

A process may hold many clients (a simulation) or one (a hospital). Either way a client opens its own sealed
stream to the cloud, but the split model is built once per shape and lent: frozen weights are the same for
all, and a client's state is its adapter alone. So a hundred simulated clients cost one download and one copy.

No Flower here: arrays in, arrays and figures out. Names of arrays are those of PEFT's files.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from tightbeam.common.config import AdapterSection, Codecs, TrainSection
from tightbeam.common.costs.flops import EdgeFlops
from tightbeam.common.costs.meter import peak_memory_bytes
from tightbeam.common.costs.rows import StepBytes, StepRow
from tightbeam.common.errors import NonFiniteError, UpdateRefusedError
from tightbeam.common.federation import Arrays, LoraAdapter, LoraModule, fold
from tightbeam.edge.adapters import attach_adapter
from tightbeam.edge.connection import Cloud
from tightbeam.edge.data import IGNORED, Example, collate, load_examples
from tightbeam.edge.plan import Plan
from tightbeam.edge.remote_trunk import RemoteTrunk

__all__ = ["AdapterShape", "Lender", "LocalTask", "SplitAdapter", "Work", "held_bytes", "pad_id"]


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What decides which layers carry an adapter, and of which size."""

    cut: str
    mode: str  # "ushape": every edge block learns; "top": those above the trunk, so no gradient crosses
    r: int
    scale: float  # alpha / r
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"

    def section(self, num_bottom: int) -> AdapterSection:
        """Describe it as a recipe does."""
        bottom = "|".join(map(str, range(num_bottom)))
        skip = {"exclude_modules": rf".*\.(?:{bottom})\..*"} if self.mode == "top" and num_bottom else {}
        targets: Any = self.target_modules  # a tuple here, so that shapes can be keys
        return AdapterSection(
            r=self.r,
            alpha=self.scale * self.r,
            dropout=self.dropout,
            target_modules="all-linear" if targets == "all-linear" else list(targets),
            extra=skip,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTask:
    """One client's work in one round."""

    steps: int  # optimizer steps
    batch_size: int
    lr: float
    optimizer: str  # "adamw" or "sgd", both without weight decay
    max_grad_norm: float  # 0 does not clip
    proximal: float  # FedProx's mu
    first_step: int  # where in the client's own order of examples this round begins
    order_seed: int
    dropout_seed: int
    only_B: bool = False  # FFA: A is frozen


@dataclass(kw_only=True)
class Work:
    """What a client did, for its ledger and for the report."""

    loss: float = 0.0  # mean over learned tokens, nats
    tokens: int = 0
    learned_tokens: int = 0
    steps: int = 0
    edge_flops: int = 0
    wall_s: float = 0.0
    edge_s: float = 0.0  # of them, not waiting for the cloud
    memory_bytes: int = 0  # the most that this process has held
    rows: list[StepRow] = field(default_factory=list)

    @property
    def moved(self) -> StepBytes:
        """Bytes of all steps."""
        return sum((row.bytes for row in self.rows), StepBytes())

    @property
    def cloud_flops(self) -> int:
        """Operations that the cloud counted."""
        return sum(row.cloud_flops for row in self.rows)


class Lender:
    """The split models of one process, one per shape, all on the same frozen weights."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, AdapterShape], SplitAdapter] = {}
        self._weights: dict[tuple[str, str], Tensor] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._examples: dict[tuple[str, Path, int, bool], list[Example]] = {}

    def tokenizer(self, cloud: Cloud) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, read once."""
        key = cloud.card.fingerprint
        if key not in self._tokenizers:
            self._tokenizers[key] = cloud.load_tokenizer()
        return self._tokenizers[key]

    def examples(self, cloud: Cloud, path: Path, *, max_length: int, answer_only: bool) -> list[Example]:
        """A client's file, read and tokenised once. Raises `DataError`."""
        key = cloud.card.fingerprint, path, max_length, answer_only
        if key not in self._examples:
            self._examples[key] = load_examples(
                path, self.tokenizer(cloud), max_length=max_length, answer_only=answer_only
            )
        return self._examples[key]

    def lend(self, cloud: Cloud, shape: AdapterShape, codec: str | Codecs) -> "SplitAdapter":
        """A model of this shape whose steps go through `cloud`; take it back by lending it again.

        Raises what `Cloud.load_model` and `attach_adapter` raise.
        """
        key = cloud.card.fingerprint, shape
        if key not in self._models:
            model = cloud.load_model(shape.cut)
            for name, parameter in model.named_parameters():
                shared = self._weights.setdefault((cloud.card.fingerprint, name), parameter.data)
                parameter.data = shared
            bottom = int(shape.cut.partition(":")[0])
            self._models[key] = SplitAdapter(attach_adapter(model, shape.section(bottom)))
        lent = self._models[key]
        lent.trunk.stepper = cloud.open_steps(shape.cut, codec=codec, dtype=lent.model.dtype)
        return lent


class SplitAdapter:
    """An adapter on a split model: dressed with a client's arrays, trained, undressed."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        (self.trunk,) = (module for module in model.modules() if isinstance(module, RemoteTrunk))
        # save_embedding_layers: PEFT would ask the model hub whether frozen embeddings changed
        self._tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
        self._originals: dict[str, Tensor] = {}

    @property
    def weight_bytes(self) -> int:
        """Frozen weights and adapter held at the edge."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def training_bytes(self, optimizer: str) -> int:
        """What must fit in memory to train: weights, gradients and the optimizer's state; no activations."""
        copies = 3 if optimizer == "adamw" else 1
        return self.weight_bytes + copies * sum(4 * tensor.numel() for tensor in self._tensors.values())

    def layers(self) -> dict[str, tuple[int, int]]:
        """Shape of A, for every tensor A, and of B: [r, in] and [out, r]."""
        return {name: (tensor.shape[0], tensor.shape[1]) for name, tensor in self._tensors.items()}

    def wear(self, arrays: Arrays, folded: LoraAdapter | None = None) -> None:
        """Put on a client's adapter; `folded` is added to the frozen weights of the layers that it names.

        Raises:
            UpdateRefusedError: other names or shapes than this model's.

        """
        self.undress()
        for name in sorted(self._tensors.keys() | arrays.keys()):
            own, given = self._tensors.get(name), arrays.get(name)
            if own is None or given is None or tuple(own.shape) != given.shape:
                shapes = [None if t is None else list(t.shape) for t in (own, given)]
                raise UpdateRefusedError(
                    f"The global adapter does not fit: {name} is {shapes[1]}, not {shapes[0]}.",
                    cure="Server and client must run the same scenario on the same backbone.",
                )
            own.copy_(torch.from_numpy(np.ascontiguousarray(given, dtype=np.float32)))
        for layer, module in (folded.modules if folded else {}).items():
            self._fold(layer, module)

    def undress(self) -> None:
        """Take folded updates out again: the frozen weights belong to all clients."""
        for layer, original in self._originals.items():
            self._base(layer).weight.data = original
        self._originals = {}

    def arrays(self, *, only_B: bool = False) -> dict[str, NDArray[np.float32]]:
        """A copy of the adapter under PEFT's names."""
        return {
            name: tensor.detach().cpu().float().numpy().copy()
            for name, tensor in self._tensors.items()
            if not only_B or ".lora_A." not in name
        }

    def plan_tokens(self, examples: Sequence[Example], task: LocalTask) -> int:
        """Tokens that `train` will send, padding left out."""
        return sum(len(e.input_ids) for batch in _batches(examples, task) for e in batch)

    def planned_flops(self, examples: Sequence[Example], task: LocalTask) -> int:
        """Operations that `train` will take at the edge."""
        flops = EdgeFlops.from_model(self.model)
        sizes = [(len(batch), max(len(e.input_ids) for e in batch)) for batch in _batches(examples, task)]
        return sum(flops.forward(*size) + flops.backward(*size) for size in sizes)

    def train(self, examples: Sequence[Example], task: LocalTask, pad_id: int, rows: list[StepRow]) -> Work:
        """Run the task's steps; `rows` is where the connection puts the accounts of its steps.

        Raises `NonFiniteError` for a loss or gradient that is not finite, and what the steps raise.
        """
        began_s, work = time.perf_counter(), Work(rows=rows)
        torch.manual_seed(task.dropout_seed)
        trained = self._trainable(only_B=task.only_B)
        anchor = [p.detach().clone() for p in trained]
        make = torch.optim.AdamW if task.optimizer == "adamw" else torch.optim.SGD
        optimizer = make(trained, lr=task.lr, weight_decay=0.0)
        flops = EdgeFlops.from_model(self.model)
        self.model.train()
        for batch_of_examples in _batches(examples, task):
            batch = self._batch(batch_of_examples, pad_id)
            loss = self.model(**batch, use_cache=False).loss
            self._count(work, batch, float(loss.detach()))
            if task.proximal:
                drift = sum((p - a).square().sum() for p, a in zip(trained, anchor, strict=True))
                loss = loss + task.proximal / 2 * drift
            loss.backward()
            size = batch["input_ids"].shape
            work.edge_flops += flops.forward(*size) + flops.backward(*size)
            limit = task.max_grad_norm or math.inf
            _require_finite(float(torch.nn.utils.clip_grad_norm_(trained, limit)), "gradient norm")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self._finish(work, began_s)

    @torch.no_grad()
    def evaluate(
        self, examples: Sequence[Example], batch_size: int, pad_id: int, rows: list[StepRow]
    ) -> Work:
        """Mean loss over all learned tokens of the examples."""
        began_s, work = time.perf_counter(), Work(rows=rows)
        flops = EdgeFlops.from_model(self.model)
        self.model.eval()
        by_length = sorted(examples, key=lambda example: len(example.input_ids))  # little padding
        for start in range(0, len(by_length), batch_size):
            batch = self._batch(by_length[start : start + batch_size], pad_id)
            self._count(work, batch, float(self.model(**batch, use_cache=False).loss))
            work.edge_flops += flops.forward(*batch["input_ids"].shape)
        return self._finish(work, began_s)

    def _trainable(self, *, only_B: bool) -> list[nn.Parameter]:
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(not (only_B and "lora_A" in name))
        return [p for p in self.model.parameters() if p.requires_grad]

    def _batch(self, examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
        return {name: tensor.to(self.model.device) for name, tensor in collate(examples, pad_id).items()}

    def _count(self, work: Work, batch: dict[str, Tensor], loss: float) -> None:
        learned = int((batch["labels"][:, 1:] != IGNORED).sum())
        total = work.loss * work.learned_tokens + _require_finite(loss, "loss") * learned
        work.learned_tokens += learned
        work.loss = total / work.learned_tokens
        work.tokens += int(batch["attention_mask"].sum())
        work.steps += 1

    def _finish(self, work: Work, began_s: float) -> Work:
        work.wall_s = time.perf_counter() - began_s
        away_s = sum(
            row.network_s + row.cloud_queue_s + row.cloud_compute_s + row.codec_s + row.seal_s
            for row in work.rows
        )
        work.edge_s = max(work.wall_s - away_s, 0.0)
        work.memory_bytes = peak_memory_bytes(str(self.model.device))
        return work

    def _base(self, layer: str) -> nn.Module:
        module = self.model.get_submodule(layer)
        base = module.base_layer
        assert isinstance(base, nn.Linear | Conv1D)
        return base

    def _fold(self, layer: str, module: LoraModule) -> None:
        base = self._base(layer)
        original = base.weight.data
        assert isinstance(original, Tensor)
        self._originals[layer] = original
        folded = fold(original.float().cpu().numpy(), module, transposed=isinstance(base, Conv1D))
        base.weight.data = torch.from_numpy(folded).to(original)


def _batches(examples: Sequence[Example], task: LocalTask) -> list[list[Example]]:
    section = TrainSection(steps=task.steps, batch_size=task.batch_size)
    plan = Plan(len(examples), section, task.order_seed)
    steps = range(task.first_step, task.first_step + task.steps)
    return [[examples[row] for row in rows] for step in steps for rows in plan.micro_batches(step)]


def _require_finite(value: float, what: str) -> float:
    if math.isfinite(value):
        return value
    raise NonFiniteError(
        f"The {what} of a local step is {value}; this client hands in no update.",
        cure="Lower train.lr or train.max_grad_norm.",
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do where the attention mask is 0."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(candidate for candidate in candidates if isinstance(candidate, int)))


def held_bytes(blobs: Mapping[str, int], cut: str, num_blocks: int) -> int:
    """Bytes of the weights that a client of this cut fetches once; `blobs` are the card's, by name."""
    bottom, top = map(int, cut.split(":"))
    trunk = {f"block.{index}" for index in range(bottom, num_blocks - top)}
    return sum(size for name, size in blobs.items() if not name.startswith("file/") and name not in trunk)
