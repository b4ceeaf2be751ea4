"""Takes a run's steps to the cloud and back, whatever happens on the way, and accounts for each.

A transient failure reconnects with a fresh handshake and sends the step again under the same key, so it is
billed once. A cloud that lost a step between forward and backward gets the inputs again. Permanent errors
are raised at once.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

from torch import Tensor

from tightbeam.common.backbone import Segments, Taps, tap_name
from tightbeam.common.config import Codecs
from tightbeam.common.costs.rows import Purpose, StepBytes, StepRow
from tightbeam.common.errors import (
    IntegrityError,
    NonFiniteError,
    ProtocolError,
    StepTooLargeError,
    TightbeamError,
    UnknownStepError,
    error_from_code,
)
from tightbeam.common.wire.messages import encode_tensor
from tightbeam.common.wire.stepping import GRADIENT, HIDDEN, KINDS, rounding_seed
from tightbeam.edge.channel import Channel, Exchange
from tightbeam.proto.backbone_pb2 import BACKWARD, FORWARD, StepKind, StepReply, StepRequest, TensorSpec

__all__ = ["Answer", "Flight", "RetryPolicy", "Stepper"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How long transient failures are retried; printed with every retry."""

    give_up_after_s: float = 120.0
    first_wait_s: float = 0.25
    longest_wait_s: float = 10.0
    longest_silence_s: float = 600.0  # of a cloud that is there but does not answer a step
    max_integrity_failures: int = 3  # a wire that keeps altering records is not a transient fault


class Stepper:
    """The steps of one run, over one channel at a time."""

    def __init__(
        self,
        run: str,
        open_channel: Callable[[], Channel],
        codecs: Codecs,
        *,
        max_tokens_per_step: int,
        on_row: Callable[[StepRow], None] = lambda row: None,
        on_retry: Callable[[str], None] = print,
        policy: RetryPolicy | None = None,
        numbers: Iterator[int] | None = None,
    ) -> None:
        self.run, self.codecs = run, codecs
        self.taps: Taps | None = None  # asked for with every forward that no backward follows
        self._open_channel = open_channel
        self._max_tokens = max_tokens_per_step
        self._on_row, self._on_retry = on_row, on_retry
        self._policy = policy or RetryPolicy()
        self._channel: Channel | None = None
        # shared by all models of a run: a step key is never used twice; next() of a count is atomic
        self._numbers = itertools.count() if numbers is None else numbers

    def forward(
        self, hidden_ND: Tensor, segments: Segments, *, keep: bool, purpose: Purpose = ""
    ) -> tuple[Tensor, int]:
        """Hidden states after the trunk, `[N, D]` on the CPU, and the step's number.

        `purpose` is for the account; if left out, a forward whose backward follows is for training.

        Raises `StepTooLargeError`, `NonFiniteError`, and `CloudUnavailableError` after the retry limit.
        """
        job = self._forward_job(hidden_ND, segments, keep)
        job.purpose = purpose or ("train" if keep else "evaluate")
        return self._finish(job, HIDDEN), job.step

    def submit(self, hidden_ND: Tensor, segments: Segments, *, purpose: Purpose = "fill") -> "Flight":
        """Send a forward that no backward will follow and do not wait for it; see `collect`."""
        job = self._forward_job(hidden_ND, segments, keep=False)
        job.purpose = purpose
        return self._start(job)

    def collect(self, flight: "Flight") -> "Answer":
        """Wait for a submitted forward; a lost one is sent again. Raises what `forward` raises."""
        started_s = time.perf_counter()
        exchange = self._exchange(flight.job, flight)
        flight.job.waited_s = time.perf_counter() - started_s
        rows = Answer(self._result(flight.job, exchange, HIDDEN), *_coded(exchange, HIDDEN))
        return replace(rows, taps=tuple(self._taps_of(exchange, flight.job)))

    def _taps_of(self, exchange: Exchange, job: "_Job") -> Iterator["Answer"]:
        started_s = time.perf_counter()
        for block in job.header.taps:
            assert self.taps is not None
            name = tap_name(block)
            tap_NP = exchange.reply.tensor(name)
            if tap_NP.shape[1] != self.taps.size:
                raise ProtocolError(f"The cloud answered with a tap of {tap_NP.shape[1]} elements.")
            yield Answer(tap_NP, *_coded(exchange, name))
        job.codec_s += time.perf_counter() - started_s

    def _forward_job(self, hidden_ND: Tensor, segments: Segments, keep: bool) -> "_Job":
        if segments.num_tokens > self._max_tokens:
            raise StepTooLargeError(
                f"A batch of {segments.num_tokens} tokens is over the cloud's limit of {self._max_tokens}.",
                cure="Lower train.batch_size or data.max_length.",
            )
        step = next(self._numbers)
        codecs = self.codecs
        job = _Job(FORWARD, step, segments, keep, codecs.activations_down, rounding_seed(self.run, step))
        if self.taps is not None and not keep:
            job.header.taps.extend(self.taps.blocks)
            job.header.projection = self.taps.projection
        job.add(HIDDEN, _finite(hidden_ND, "activations"), codecs.activations_up)
        return job

    def backward(self, step: int, grad_ND: Tensor, hidden_ND: Tensor, segments: Segments) -> Tensor:
        """The gradient of the trunk's input, `[N, D]` on the CPU; `hidden_ND` is the forward's input."""
        codecs = self.codecs
        job = _Job(BACKWARD, step, segments, False, codecs.gradients_down, rounding_seed(self.run, step))
        job.purpose = "train"
        job.add(GRADIENT, _finite(grad_ND, "gradients"), codecs.gradients_up)
        try:
            return self._finish(job, GRADIENT)
        except UnknownStepError:
            job.add(HIDDEN, hidden_ND, codecs.activations_up)
            return self._finish(job, GRADIENT)

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _finish(self, job: "_Job", result: str) -> Tensor:
        return self._result(job, self._exchange(job), result)

    def _result(self, job: "_Job", exchange: Exchange, result: str) -> Tensor:
        started_s = time.perf_counter()
        tensor_ND = exchange.reply.tensor(result)
        job.codec_s += time.perf_counter() - started_s
        self._on_row(job.row(self.run, exchange))
        return tensor_ND

    def _exchange(self, job: "_Job", flight: "Flight | None" = None) -> Exchange:
        started_s, wait_s, num_integrity = time.monotonic(), self._policy.first_wait_s, 0
        while True:
            try:
                return self._attempt(flight or self._start(job))
            except TightbeamError as error:
                altered = isinstance(error, IntegrityError)
                num_integrity += altered
                retry = error.transient or (altered and num_integrity <= self._policy.max_integrity_failures)
                left_s = self._policy.give_up_after_s - (time.monotonic() - started_s)
                if not retry or left_s <= 0:
                    raise
                limit = f"for up to {left_s:.0f} s more"
                if altered:
                    limit += (
                        f"; altered {num_integrity} of at most {self._policy.max_integrity_failures} times"
                    )
                self._on_retry(f"{error.message} Retrying step {job.step} {limit}.")
            flight = None
            time.sleep(min(wait_s, max(left_s, 0.0)))
            wait_s = min(2 * wait_s, self._policy.longest_wait_s)

    def _start(self, job: "_Job") -> "Flight":
        job.attempts += 1
        try:
            if self._channel is None:
                self._channel = self._open_channel()
            return Flight(job, self._channel, self._channel.submit(job.header, job.payloads))
        except TightbeamError as error:
            failed: Future[Exchange] = Future()
            failed.set_exception(error)
            return Flight(job, self._channel, failed)

    def _attempt(self, flight: "Flight") -> Exchange:
        try:
            exchange = flight.future.result()
        except TightbeamError:
            if flight.channel is self._channel:  # else another flight has opened a new one already
                self.close()
            raise
        reply: StepReply = exchange.reply.header
        if reply.HasField("failure"):
            flight.job.resent_bytes += exchange.moved.wire_total_bytes
            raise error_from_code(reply.failure.code, reply.failure.message, reply.failure.cure)
        return exchange


@dataclass(frozen=True, slots=True)
class Flight:
    """A submitted step on its way."""

    job: "_Job"
    channel: Channel | None
    future: Future[Exchange]

    @property
    def landed(self) -> bool:
        """Whether `collect` will not have to wait, short of a failure."""
        return self.future.done()


@dataclass(frozen=True, slots=True)
class Answer:
    """A forward's result, decoded and as it crossed the wire; taps that came along are results too."""

    hidden_ND: Tensor  # on the CPU
    codec: str
    payload: Tensor  # uint8
    taps: tuple["Answer", ...] = ()


def _coded(exchange: Exchange, name: str) -> tuple[str, Tensor]:
    reply = exchange.reply
    place = next(i for i, spec in enumerate(reply.header.tensors) if spec.name == name)
    return reply.header.tensors[place].codec, reply.payloads[place]


class _Job:
    """One step of one kind until it is answered."""

    def __init__(
        self, kind: StepKind.ValueType, step: int, segments: Segments, keep: bool, reply_codec: str, seed: int
    ) -> None:
        starts, counts = segments.runs()
        self.kind, self.step, self.segments, self.seed = kind, step, segments, seed
        self.header = StepRequest(
            step=step,
            kind=kind,
            keep=keep,
            reply_codec=reply_codec,
            lengths=segments.lengths,
            run_starts=starts,
            run_lengths=counts,
        )
        self.payloads: list[Tensor] = []
        self.attempts = 0
        self.resent_bytes = 0
        self.codec_s = 0.0
        self.purpose: Purpose = ""
        self.waited_s: float | None = None  # of a submitted step; others are waited for from start to end

    def add(self, name: str, tensor_ND: Tensor, codec: str) -> None:
        """Code one tensor into the request."""
        started_s = time.perf_counter()
        spec: TensorSpec
        spec, payload = encode_tensor(name, tensor_ND, codec, self.seed)
        self.header.tensors.append(spec)
        self.payloads.append(payload)
        self.codec_s += time.perf_counter() - started_s

    def row(self, run: str, exchange: Exchange) -> StepRow:
        """The accounts of the finished step.

        What an earlier attempt was billed for counts, the rest is re-sent.
        """
        reply: StepReply = exchange.reply.header
        billed, resent_bytes = exchange.moved, self.resent_bytes
        if reply.HasField("billed_before"):
            receipt = reply.billed_before
            billed = StepBytes(**{field.name: value for field, value in receipt.ListFields()})
            resent_bytes += exchange.moved.wire_total_bytes
        return StepRow(
            run=run,
            step=self.step,
            kind=KINDS[self.kind],
            tokens=self.segments.num_tokens,
            segments=len(self.segments.lengths),
            bytes=billed,
            cloud_flops=reply.flops,
            codec_s=self.codec_s,
            seal_s=exchange.seal_s,
            network_s=max(exchange.wall_s - exchange.seal_s - reply.queue_s - reply.compute_s, 0.0),
            cloud_queue_s=reply.queue_s,
            cloud_compute_s=reply.compute_s,
            resent_bytes=resent_bytes,
            attempts=self.attempts,
            time_unix_s=time.time(),
            purpose=self.purpose,
            waited_s=self.waited_s,
        )


def _finite(tensor_ND: Tensor, what: str) -> Tensor:
    if not bool(tensor_ND.isfinite().all()):
        raise NonFiniteError(
            f"The {what} at the cut hold NaN or Inf; nothing was sent.",
            cure="Lower train.lr, clip gradients, or use float32; the last checkpoint is untouched.",
        )
    return tensor_ND
