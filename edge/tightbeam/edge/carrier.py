"""Takes jobs to the cloud and back, whatever happens on the way, over one channel at a time.

A transient failure reconnects with a fresh handshake and sends the step again under the same key, so it is
billed once. Permanent errors are raised at once.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from tightbeam.common.errors import IntegrityError, TightbeamError, error_from_code
from tightbeam.edge.channel import Channel, Exchange
from tightbeam.edge.jobs import Job
from tightbeam.proto.backbone_pb2 import StepReply

__all__ = ["Carrier", "Flight", "RetryPolicy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How long transient failures are retried; printed with every retry."""

    give_up_after_s: float = 120.0
    first_wait_s: float = 0.25
    longest_wait_s: float = 10.0
    longest_silence_s: float = 600.0  # of a cloud that is there but does not answer a step
    max_integrity_failures: int = 3  # a wire that keeps altering records is not a transient fault


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


class Carrier:
    """Holds the channel, and opens another when it breaks."""

    def __init__(
        self, open_channel: Callable[[], Channel], policy: RetryPolicy, on_retry: Callable[[str], None]
    ) -> None:
        self._open_channel, self._policy, self._on_retry = open_channel, policy, on_retry
        self._channel: Channel | None = None
        self.num_sessions = 0  # opened so far

    def start(self, job: Job) -> Flight:
        """Send a job and do not wait for its answer; what fails here is raised by `exchange`."""
        job.attempts += 1
        try:
            if self._channel is None:
                self._channel = self._open_channel()
                self.num_sessions += 1
            return Flight(job, self._channel, self._channel.submit(job.header, job.payloads))
        except TightbeamError as error:
            failed: Future[Exchange] = Future()
            failed.set_exception(error)
            return Flight(job, self._channel, failed)

    def exchange(self, job: Job, flight: Flight | None = None) -> Exchange:
        """Wait for the answer of a job, which may be on its way already, and send it again if need be."""
        started_s, wait_s, num_integrity = time.monotonic(), self._policy.first_wait_s, 0
        while True:
            try:
                return self._attempt(flight or self.start(job))
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
                self._on_retry(f"{error.message} Retrying {limit}.")
            flight = None
            time.sleep(min(wait_s, max(left_s, 0.0)))
            wait_s = min(2 * wait_s, self._policy.longest_wait_s)

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
            flight.job.resent_bytes += exchange.moved.wire_total_bytes
            raise error_from_code(reply.failure.code, reply.failure.message, reply.failure.cure)
        return exchange
