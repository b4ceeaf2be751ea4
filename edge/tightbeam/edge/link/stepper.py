"""What a run's steps are: their numbers, codecs and taps, and what becomes of the answers.

`Carrier` (carrier.py) takes them to the cloud and back. A cloud that lost a step between forward and backward
gets the inputs again.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tightbeam.common.accounts.rows import Purpose, StepRow
from tightbeam.common.backbone import Segments, Taps, tap_name
from tightbeam.common.errors import ProtocolError, StepTooLargeError, UnknownStepError
from tightbeam.common.wire.prefixes import RowMap, SharedPrefixes
from tightbeam.common.wire.stepping import GRADIENT, HIDDEN, rounding_seed
from tightbeam.edge.link.carrier import Carrier, Flight, RetryPolicy
from tightbeam.edge.link.channel import Channel, Exchange
from tightbeam.edge.link.step import Job, finite, judged
from tightbeam.edge.recipe import Codecs
from tightbeam.proto.backbone_pb2 import BACKWARD, FORWARD, StepKind

__all__ = ["Answer", "Inputs", "Stepper"]


class Stepper:
    """The steps of one run."""

    def __init__(
        self,
        run: str,
        open_channel: Callable[[], Channel],
        codecs: Codecs,
        *,
        trunk_dtype: str,
        max_tokens_per_step: int,
        share_prefixes: bool = False,
        on_row: Callable[[StepRow], None] = lambda row: None,
        on_retry: Callable[[str], None] = print,
        on_send: Callable[[dict[str, Any]], None] = lambda row: None,
        policy: RetryPolicy | None = None,
        numbers: Iterator[int] | None = None,
    ) -> None:
        self.trunk_dtype = trunk_dtype  # in which the cloud computes
        self.run, self.codecs = run, codecs
        self.taps: Taps | None = None  # asked for with every forward that no backward follows
        self._carrier = Carrier(
            open_channel, policy or RetryPolicy(), on_retry, lambda job: on_send(job.intent(run))
        )
        self.max_tokens_per_step = max_tokens_per_step
        self._share_prefixes = share_prefixes  # where the tokens are known; the cloud must understand it
        self._on_row = on_row
        # shared by all models of a run: a step key is never used twice; next() of a count is atomic
        self._numbers = itertools.count() if numbers is None else numbers

    def forward(
        self,
        hidden_ND: Tensor,
        segments: Segments,
        *,
        keep: bool,
        purpose: Purpose = "",
    ) -> tuple[Tensor, "Inputs"]:
        """Hidden states after the trunk, `[N, D]` on the CPU, and what `backward` needs.

        `purpose` is for the account; if left out, a forward whose backward follows is for training.

        Raises `StepTooLargeError`, `NonFiniteError`, and `CloudUnavailableError` after the retry limit.
        """
        job = self._forward_job(segments, keep, purpose or ("train" if keep else "evaluate"))
        finite(hidden_ND, "activations")
        job.add(HIDDEN, hidden_ND, self.codecs.activations_up)
        return self._finish(job, HIDDEN), Inputs(job.step, hidden_ND, segments)

    def backward(self, inputs: "Inputs", grad_ND: Tensor) -> Tensor:
        """The gradient of the trunk's input, `[N, D]` on the CPU; `inputs` came from the forward."""
        job = self._job(BACKWARD, inputs.step, inputs.segments, "train")
        job.add(GRADIENT, finite(grad_ND, "gradients"), self.codecs.gradients_up)
        try:
            return self._finish(job, GRADIENT)
        except UnknownStepError:
            job.add(HIDDEN, inputs.hidden_ND, self.codecs.activations_up)
            return self._finish(job, GRADIENT)

    def submit(
        self,
        hidden_ND: Tensor,
        segments: Segments,
        *,
        purpose: Purpose = "fill",
        input_ids_N: Tensor | None = None,
    ) -> Flight:
        """Send a forward that no backward will follow and do not wait for it; see `collect`.

        With the tokens, rows that its sequences have in common cross once: they must follow from tokens and
        positions alone, so nothing random may be below. Tokens themselves are not sent.
        """
        job = self._forward_job(segments, False, purpose)
        prefixes = None if input_ids_N is None else self.shared_prefixes(input_ids_N, segments)
        if prefixes is not None:
            job.leave_out(prefixes)
        job.add(HIDDEN, finite(hidden_ND, "activations"), self.codecs.activations_up)
        return self._carrier.start(job)

    def shared_prefixes(self, input_ids_N: Tensor, segments: Segments) -> SharedPrefixes | None:
        """What a submitted forward of these tokens leaves out; None for nothing."""
        return SharedPrefixes.find(input_ids_N, segments) if self._share_prefixes else None

    def collect(self, flight: Flight) -> "Answer":
        """Wait for a submitted forward; a lost one is sent again. Raises what `forward` raises."""
        started_s = time.perf_counter()
        exchange = self._carrier.exchange(flight.job, flight)
        flight.job.waited_s = time.perf_counter() - started_s
        rows = Answer.of(self._result(flight.job, exchange, HIDDEN), exchange, HIDDEN)
        answer = replace(rows, taps=tuple(self._taps_of(exchange, flight.job)))
        return answer if flight.job.row_map is None else answer.spread(flight.job.row_map)

    def probe(self, hidden_size: int) -> None:
        """All that a first step does, for a backward of a step that never was: nothing is computed or billed.

        Raises what opening a stream and running a step raise.
        """
        nothing = Segments((1,), torch.zeros(1, dtype=torch.int64))
        job = self._job(BACKWARD, next(self._numbers), nothing, "train")
        job.add(GRADIENT, torch.zeros(1, hidden_size), self.codecs.gradients_up)
        try:
            self._carrier.exchange(job)
        except UnknownStepError:
            return
        raise ProtocolError("The cloud answered a step that never was.")

    def __deepcopy__(self, memo: dict[int, object]) -> "Stepper":
        """A copied model, such as the reference of preference training, makes its steps here too."""
        return self

    def close(self) -> None:
        """Close the channel."""
        self._carrier.close()

    def _taps_of(self, exchange: Exchange, job: Job) -> Iterator["Answer"]:
        with job.coding():
            for block in job.header.taps:
                assert self.taps is not None
                name = tap_name(block)
                tap_NP = exchange.reply.tensor(name)
                if tap_NP.shape[1] != self.taps.size:
                    raise ProtocolError(f"The cloud answered with a tap of {tap_NP.shape[1]} elements.")
                yield Answer.of(judged(tap_NP, job.step), exchange, name)

    def _forward_job(self, segments: Segments, keep: bool, purpose: Purpose) -> Job:
        if segments.num_tokens > self.max_tokens_per_step:
            raise StepTooLargeError(
                f"A batch of {segments.num_tokens} tokens is over the cloud's limit of "
                f"{self.max_tokens_per_step}.",
                cure="Lower train.batch_size or data.max_length.",
            )
        job = self._job(FORWARD, next(self._numbers), segments, purpose, keep=keep)
        if self.taps is not None and not keep:
            job.header.taps.extend(self.taps.blocks)
            job.header.projection = self.taps.projection
        return job

    def _job(
        self,
        kind: StepKind.ValueType,
        step: int,
        segments: Segments,
        purpose: Purpose,
        *,
        keep: bool = False,
    ) -> Job:
        codecs = self.codecs
        reply_codec = codecs.activations_down if kind == FORWARD else codecs.gradients_down
        seed = rounding_seed(self.run, step)
        return Job(kind, step, segments, reply_codec=reply_codec, seed=seed, keep=keep, purpose=purpose)

    def _finish(self, job: Job, result: str) -> Tensor:
        return self._result(job, self._carrier.exchange(job), result)

    def _result(self, job: Job, exchange: Exchange, result: str) -> Tensor:
        with job.coding():
            tensor_ND = exchange.reply.tensor(result)
        self._on_row(job.row(self.run, exchange))
        return judged(tensor_ND, job.step)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the cloud computed a forward on, for a backward that finds it lost."""

    step: int
    hidden_ND: Tensor
    segments: Segments


@dataclass(frozen=True, slots=True)
class Answer:
    """A forward's result, decoded and as it crossed the wire; taps that came along are results too."""

    hidden_ND: Tensor  # on the CPU
    codec: str
    payload: Tensor  # uint8
    taps: tuple["Answer", ...] = ()

    @classmethod
    def of(cls, tensor_ND: Tensor, exchange: Exchange, name: str) -> "Answer":
        """A decoded tensor of an exchange, and what of it crossed."""
        spec, payload = exchange.reply.coded(name)
        return cls(tensor_ND, spec.codec, payload)

    def spread(self, row_map: RowMap) -> "Answer":
        """The answer for every token, from that for the rows that crossed."""
        payload = row_map.spread_payload(self.codec, self.payload, self.hidden_ND.shape[1])
        taps = tuple(tap.spread(row_map) for tap in self.taps)
        return Answer(row_map.spread(self.hidden_ND), self.codec, payload, taps)
