"""The phase in which nothing at or below the cut is trained: samples cross once, then come from the cache.

Mode `top` is in it from the start, a freezing `ushape` enters it on the way. Training starts while the cache
fills, in the order in which the samples are first needed. All forwards run on packed rows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tightbeam.common.accounts.flops import EdgeFlops, linear_params
from tightbeam.edge.cache import ActivationCache, Scope
from tightbeam.edge.cache.filler import Filler, Sample
from tightbeam.edge.cache.shortcut import FrozenParts, TrunkShortcut, passed_through
from tightbeam.edge.data import Example
from tightbeam.edge.model.packed_rows import PackedRows
from tightbeam.edge.modes.base import Job
from tightbeam.edge.modes.last_block import last_mlp, left_out
from tightbeam.edge.modes.packed import PackedBatch, packed_attention_in, packed_loss

__all__ = ["FrozenPhase", "freeze_below"]


class FrozenPhase:
    """From optimizer step `start_step` on, until `close()`."""

    def __init__(self, job: Job, start_step: int) -> None:
        base = job.model.get_base_model()
        self.job, self.start_step = job, start_step
        self.parts = FrozenParts.of(base)
        self.bottom_sha256 = self._freeze()
        self._stack = ExitStack()
        self.cache: ActivationCache | None = None
        self.filler: Filler | None = None
        with ExitStack() as stack:
            section = job.cache
            width = int(base.config.get_text_config().hidden_size)
            if section.enabled:
                scope = self._scope(base.dtype, width)
                self.cache = stack.enter_context(
                    ActivationCache(
                        job.cache_folder,
                        scope,
                        secret=job.cache_secret,
                        max_bytes=int(section.max_gb * 1e9),
                        warn=job.say,
                    )
                )
            self.shortcut = stack.enter_context(self._shortcut(base.dtype, width))
            self.shortcut.noise = job.plan.train.noise
            stack.enter_context(packed_attention_in(base))
            if self.cache is not None:
                self.filler = Filler(self.shortcut, self._batches())
            head = base.get_output_embeddings()
            self._head_weights = linear_params(head) if head is not None else 0
            self._count_flops()
            self._last_mlp = last_mlp(base)
            self._mlp = self._count_mlp(base)
            self._stack = stack.pop_all()

    def before_step(self, step: int) -> None:
        """Have the step's samples in the cache, and some of the next on their way."""
        if self.filler is not None:
            self.filler.ensure(Sample(e.input_ids).digest for e in self.job.rows_of(step))

    def missing(self, examples: Iterable[Example]) -> list[Example]:
        """Those of `examples` that will have to cross."""
        if self.cache is None:
            return list(examples)
        return [example for example in examples if Sample(example.input_ids).digest not in self.cache]

    def before_evaluation(self) -> None:
        """Have the evaluation's samples in the cache."""
        if self.filler is not None:
            self.filler.ensure(Sample(e.input_ids).digest for e in self.job.eval)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss over the learned tokens; labels stay here, only missing activations cross."""
        return packed_loss(self.job.model, PackedBatch.of(batch), self._last_mlp)

    def flops(self, batch: dict[str, Tensor]) -> int:
        """Operations of the top blocks, each shared row once, and of the head on learned tokens."""
        packed, backward = PackedBatch.of(batch), torch.is_grad_enabled()
        head, mlp = (1 + backward) * self._head_weights, self._mlp.forward_weights
        linear, attention = self._top.forward_weights, self._top.forward_attention
        if backward:
            mlp += self._mlp.backward_weights
            linear += self._top.backward_weights
            attention += self._top.backward_attention
        if self.shortcut.runs_bottom(packed.digests):
            linear += self._below.forward_weights
            attention += self._below.forward_attention
        weights = (linear - head - mlp) * packed.rows.num_rows + head * len(packed.place_L)
        weights += mlp * packed.num_read
        return 2 * weights + attention * _squares(packed.rows.segments.lengths)

    def filling_flops(self, examples: Iterable[Example]) -> int:
        """Operations of the bottom's one pass over `examples`, ahead of the steps."""
        if self.filler is None:
            return 0
        wanted, below, total = {Sample(example.input_ids).digest for example in examples}, self._below, 0
        for group in self.filler.groups:
            if ids := [sample.input_ids for sample in group if sample.digest in wanted]:
                rows = PackedRows.of_samples(ids, torch.device("cpu"))
                total += 2 * below.forward_weights * rows.num_rows
                total += below.forward_attention * _squares(rows.segments.lengths)
        return total

    def commit(self) -> bool:
        """Put on disk what the cache holds and what is on its way; says whether anything was."""
        waited = self.filler is not None and self.filler.settle()
        if self.cache is not None:
            self.cache.commit()
        return waited

    def close(self) -> None:
        """Give the model back as an ordinary split model, and write the cache."""
        self._stack.close()

    def _freeze(self) -> str:
        return freeze_below(self.job, self.parts)

    def _scope(self, dtype: torch.dtype, width: int) -> Scope:
        job = self.job
        return self.parts.scope(job.fingerprint, job.cut, self.bottom_sha256, dtype, width)

    @contextmanager
    def _shortcut(self, dtype: torch.dtype, width: int) -> Iterator[TrunkShortcut]:
        """What answers for the trunk while the phase lasts."""
        shortcut = TrunkShortcut(self.parts, self.cache, dtype, width)
        try:
            yield shortcut
        finally:
            shortcut.remove()

    def _count_flops(self) -> None:
        whole = EdgeFlops.from_model(self.job.model)
        with passed_through(self.parts.blocks, self.parts.bottom):
            self._top = top = EdgeFlops.from_model(self.job.model)
        self._below = EdgeFlops(
            forward_weights=whole.forward_weights - top.forward_weights,
            backward_weights=0,
            forward_attention=whole.forward_attention - top.forward_attention,
            backward_attention=0,
        )

    def _count_mlp(self, base: PreTrainedModel) -> EdgeFlops:
        """Of the last block's MLP, which runs for other rows than the rest."""
        if self._last_mlp is None:
            return EdgeFlops(0, 0, 0, 0)
        whole = EdgeFlops.from_model(self.job.model)
        with left_out(base, self._last_mlp):
            rest = EdgeFlops.from_model(self.job.model)
        head = 0 if rest.backward_weights or not whole.backward_weights else self._head_weights
        return EdgeFlops(
            forward_weights=whole.forward_weights - rest.forward_weights,
            backward_weights=whole.backward_weights - rest.backward_weights - head,
            forward_attention=0,
            backward_attention=0,
        )

    def _batches(self) -> Iterator[list[Sample]]:
        """Samples in the order in which they are first needed.

        Two epochs from `start_step` on hold every sample once, wherever they start. A run begins with an
        evaluation; one that freezes on the way has its next one later.
        """
        plan, size = self.job.plan, self.job.plan.train.batch_size
        held = [_samples(self.job.eval[start : start + size]) for start in range(0, len(self.job.eval), size)]
        if self.start_step == 0:
            yield from held
        end = min(self.start_step + 2 * plan.steps_per_epoch, plan.total_steps)
        for step in range(self.start_step, end):
            for batch in plan.micro_batches(step):
                yield _samples(self.job.train[row] for row in batch)
        if self.start_step > 0:
            yield from held


def freeze_below(job: Job, parts: FrozenParts) -> str:
    """Train nothing below the cut any more; gives SHA-256 over what was trained there, or ""."""
    inside = {id(p) for module in parts.below for p in module.parameters()}
    digest, found = hashlib.sha256(), False
    for name, parameter in job.model.named_parameters():
        if id(parameter) in inside and parameter.requires_grad:
            found = True
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            values = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(values.numpy().tobytes())
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer passes over what has none, and keeps its state
    return digest.hexdigest() if found else ""


def _squares(lengths: Sequence[int]) -> int:
    return sum(n * n for n in lengths)


def _samples(examples: Iterable[Example] | Sequence[Example]) -> list[Sample]:
    return [Sample(example.input_ids) for example in examples]
