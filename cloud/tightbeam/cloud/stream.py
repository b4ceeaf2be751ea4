"""One `Steps` stream in the cloud: sealed requests in, sealed replies out, each step on its own.

Records are opened and sealed here, in the order of the stream. The first record that is not what the protocol
says ends the stream; a step that fails otherwise is answered by a failure, and the stream goes on.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator

import grpc

from tightbeam.cloud.admission import Opening, Quota
from tightbeam.cloud.rpc import Context, abort
from tightbeam.cloud.steps import StepRunner
from tightbeam.common.errors import CloudUnavailableError, TightbeamError
from tightbeam.common.wire.lines import PATIENCE_S
from tightbeam.common.wire.messages import Message, MessageReader, payload_bytes, seal_message
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["StepStream", "write"]

_log = logging.getLogger(__name__)
_STEPS_IN_FLIGHT = 3  # two that run and one whose answer leaves; who does not take answers gets no more
STALL_S = PATIENCE_S  # for the next record of a message, either way
MIN_BYTES_PER_S = 1 << 15  # of a whole message, after STALL_S; a stream that trickles holds what has arrived


class StepStream:
    """The stream of one session."""

    def __init__(
        self, opening: Opening, runner: StepRunner, in_flight_bytes: Quota, context: Context
    ) -> None:
        self._session, self._span = opening.session, opening.span
        self._runner, self._context = runner, context
        self._quota = in_flight_bytes
        self._arrived_bytes = 0  # of the message that is being read
        self._whole_bytes = 0  # that it will take once it is here
        self._until_s = 0.0  # it must be here
        self._room = asyncio.Semaphore(_STEPS_IN_FLIGHT)
        self._writing = asyncio.Lock()
        self._answers: set[asyncio.Task[None]] = set()

    async def serve(self, records: AsyncIterator[bytes]) -> None:
        """Answer until the edge ends the stream."""
        session, ended_by = self._session, None
        _log.info("stream of %s, run %r, cut %s", session.peer, session.run, session.cut)
        try:
            async with asyncio.TaskGroup() as answers:
                await self._read(records, answers)
        except* TightbeamError as group:
            ended_by = _first(group)
        finally:
            self._give(self._arrived_bytes)
            self._runner.forget(session)
        if ended_by is not None:
            _log.warning("stream of %s closed: %s", session.peer, ended_by.message)
            await abort(self._context, ended_by)

    async def finish_steps(self) -> None:
        """Wait for the steps that are being answered."""
        while self._answers:
            await asyncio.wait(self._answers)

    async def _read(self, records: AsyncIterator[bytes], answers: asyncio.TaskGroup) -> None:
        reader = MessageReader(self._session.opener, pb.StepRequest, self._admit)
        while (record := await self._next_record(records, reader)) is not None:
            message = reader.feed(record)
            self._count(self._arrived_bytes + len(record) if message is None else self._whole_bytes)
            if message is not None:
                await self._room.acquire()
                self._begin(message, answers)

    async def _next_record(
        self, records: AsyncIterator[bytes], reader: MessageReader[pb.StepRequest]
    ) -> bytes | None:
        """The next record, None at the end of the stream; between two messages an edge may take its time."""
        stalled_s = asyncio.get_running_loop().time() + STALL_S
        try:
            async with asyncio.timeout_at(None if reader.idle else min(stalled_s, self._until_s)):
                return await anext(records, None)
        except TimeoutError:
            raise CloudUnavailableError(f"The rest of a step did not come within {STALL_S:.0f} s.") from None

    def _admit(self, header: pb.StepRequest) -> None:
        """Refuse a message that would not fit now; what it takes is counted as it arrives."""
        self._whole_bytes = self._runner.admit(header, self._span)
        self._quota.check(self._session.peer, self._whole_bytes)
        self._until_s = _deadline_s(sum(map(payload_bytes, header.tensors)))

    def _count(self, num_bytes: int) -> None:
        self._quota.take(self._session.peer, num_bytes, instead_of=self._arrived_bytes)
        self._arrived_bytes = num_bytes

    def _begin(self, message: Message[pb.StepRequest], answers: asyncio.TaskGroup) -> None:
        num_bytes, self._arrived_bytes = self._arrived_bytes, 0

        def finished(task: asyncio.Task[None]) -> None:  # also for a task that was cancelled before it ran
            self._answers.discard(task)
            self._room.release()
            self._give(num_bytes)

        task = answers.create_task(self._answer(message))
        self._answers.add(task)
        task.add_done_callback(finished)

    def _give(self, num_bytes: int) -> None:
        if num_bytes:
            self._quota.give(self._session.peer, num_bytes)

    async def _answer(self, message: Message[pb.StepRequest]) -> None:
        work = self._runner.run(message, self._session, self._span)
        (result,) = await asyncio.gather(work, return_exceptions=True)
        # An error that is not ours gets an answer too, or the edge would wait for ever.
        answer = (_failed(message.header, result), []) if isinstance(result, BaseException) else result
        reply, payloads = answer
        async with self._writing:
            until_s = _deadline_s(sum(payload.numel() for payload in payloads))
            for record in seal_message(reply.SerializeToString(), payloads, self._session.sealer):
                await write(self._context, record, until_s)


async def write(context: Context, message: object, until_s: float = math.inf) -> None:
    """Send one message; an edge that does not take it in time, or is gone, is `CloudUnavailableError`."""
    stalled_s = asyncio.get_running_loop().time() + STALL_S
    try:
        async with asyncio.timeout_at(min(stalled_s, until_s)):
            await context.write(message)
    except TimeoutError:
        raise CloudUnavailableError(f"The edge took nothing for {STALL_S:.0f} s.") from None
    except grpc.aio.BaseError:
        raise CloudUnavailableError("The edge went away.") from None


def _deadline_s(num_bytes: int) -> float:
    """When a message that begins now must be through, by the loop's clock."""
    return asyncio.get_running_loop().time() + STALL_S + num_bytes / MIN_BYTES_PER_S


def _failed(header: pb.StepRequest, error: BaseException) -> pb.StepReply:
    if not isinstance(error, TightbeamError):
        _log.error("step %d failed", header.step, exc_info=error)
        error = TightbeamError(
            "The cloud failed on this step.", cure="Its operator finds why in the cloud's log."
        )
    failure = pb.Failure(code=error.code, message=error.message, cure=error.cure)
    return pb.StepReply(step=header.step, kind=header.kind, failure=failure)


def _first(group: BaseExceptionGroup[TightbeamError]) -> TightbeamError:
    error = group.exceptions[0]
    return error if isinstance(error, TightbeamError) else _first(error)
