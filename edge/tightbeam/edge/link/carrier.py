"""Takes jobs to the cloud and back, whatever happens on the way, over one channel at a time.

A transient failure reconnects with a fresh handshake and sends the step again under the same key, so it is
billed once. Permanent errors are raised at once.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from tightbeam.common.errors import CloudUnavailableError, IntegrityError, TightbeamError, error_from_code
from tightbeam.edge.link.channel import Channel, Exchange
from tightbeam.edge.link.step import Job
from tightbeam.proto.backbone_pb2 import StepReply

__all__ = ["Carrier", "Flight", "Retries", "RetryPolicy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How long transient failures are retried; printed with every retry."""

    give_up_after_s: float = 120.0  # without anything that got through
    first_wait_s: float = 0.25
    longest_wait_s: float = 10.0
    longest_silence_s: float = 600.0  # of a cloud that is there but does not answer a step
    max_integrity_failures: int = 3  # a wire that keeps altering records is not a transient fault
    max_broken: int = 5  # times that a step breaks off on its way and the clock of the limit starts anew


@dataclass(frozen=True, slots=True)
class Flight:
    """A submitted step on its way."""

    job: Job
    channel: Channel | None
    future: Future[Exchange]

    @property
    def landed(self) -> bool:
        """Whether `collect` will not have to wait, short of a failure."""
        return self.future.done()


class Retries:
    """Whether something that failed is tried again; waits before it is."""

    def __init__(self, policy: RetryPolicy, on_retry: Callable[[str], None]) -> None:
        self._policy, self._on_retry = policy, on_retry
        self.moved()

    def moved(self) -> None:
        """Something got through: the limit's clock starts with the next failure."""
        self._until_s: float | None = None
        self._wait_s = self._policy.first_wait_s

    def failed(
        self, error: TightbeamError, what: str = "", *, transient: bool | None = None, note: str = ""
    ) -> None:
        """Say so and wait before the next attempt; raises the error when it is permanent or too late."""
        now_s = time.monotonic()
        self._until_s = self._until_s or now_s + self._policy.give_up_after_s
        left_s = self._until_s - now_s
        if not (error.transient if transient is None else transient) or left_s <= 0:
            raise error
        self._on_retry(f"{error.message} Retrying {what}for up to {left_s:.0f} s more{note}.")
        time.sleep(min(self._wait_s, left_s))
        self._wait_s = min(2 * self._wait_s, self._policy.longest_wait_s)


class Carrier:
    """Holds the channel, and opens another when it breaks."""

    def __init__(
        self,
        open_channel: Callable[[], Channel],
        policy: RetryPolicy,
        on_retry: Callable[[str], None],
        on_send: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self._open_channel, self._policy, self._on_retry = open_channel, policy, on_retry
        self._on_send = on_send
        self._channel: Channel | None = None

    def start(self, job: Job) -> Flight:
        """Send a job and do not wait for its answer; what fails here is raised by `exchange`."""
        if not job.attempts:
            self._on_send(job)
        job.begin_attempt()
        try:
            if self._channel is None:
                self._channel = self._open_channel()
            return Flight(job, self._channel, self._channel.submit(job.header, job.payloads))
        except TightbeamError as error:
            failed: Future[Exchange] = Future()
            failed.set_exception(error)
            return Flight(job, self._channel, failed)

    def exchange(self, job: Job, flight: Flight | None = None) -> Exchange:
        """Wait for the answer of a job, which may be on its way already, and send it again if need be."""
        retries, num_integrity, num_broken = Retries(self._policy, self._on_retry), 0, 0
        while True:
            flight, started_s = flight or self.start(job), time.monotonic()
            try:
                return self._attempt(flight)
            except TightbeamError as error:
                altered, note = isinstance(error, IntegrityError), ""
                if altered:
                    num_integrity += 1
                    limit = self._policy.max_integrity_failures
                    note = f"; altered {num_integrity} of at most {limit} times"
                    if num_integrity > limit:
                        raise
                # a step may well take longer than the limit; one that nobody answers is no sign of life
                silent = time.monotonic() - started_s >= self._policy.longest_silence_s
                if isinstance(error, CloudUnavailableError) and flight.channel is not None and not silent:
                    num_broken += 1
                    if num_broken <= self._policy.max_broken:
                        retries.moved()
                retries.failed(error, transient=error.transient or altered, note=note)
            flight = None

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _attempt(self, flight: Flight) -> Exchange:
        try:
            exchange = flight.future.result()
        except TightbeamError:
            if flight.channel is self._channel:  # else another flight has opened a new one already
                self.close()
            raise
        reply: StepReply = exchange.reply.header
        if reply.HasField("failure"):
            flight.job.resent_bytes += exchange.moved.wire_total_bytes + exchange.resent_bytes
            raise error_from_code(reply.failure.code, reply.failure.message, reply.failure.cure)
        return exchange
