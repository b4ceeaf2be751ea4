"""The gRPC service: an async front that never computes. Follow one step in `BackboneService.steps`.

Records are opened and sealed here, in the order of the stream; codecs and the ledger run in a thread pool;
the engine's one worker owns the device. A step's ledger row is durable before its reply leaves.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from torch import Tensor

from tightbeam.cloud.backbone import Backbone
from tightbeam.cloud.card import make_card
from tightbeam.cloud.engine import Done, Engine
from tightbeam.cloud.ledger import Ledger, LedgerEntry
from tightbeam.common.backbone import Cut
from tightbeam.common.costs.framing import wire_bytes
from tightbeam.common.costs.prices import Prices
from tightbeam.common.costs.rows import StepBytes
from tightbeam.common.errors import (
    CloudUnavailableError,
    FingerprintError,
    IdentityError,
    ProtocolError,
    StepTooLargeError,
    TightbeamError,
    UsageError,
)
from tightbeam.common.identity import Trust
from tightbeam.common.wire.handshake import CloudKeys, Session
from tightbeam.common.wire.messages import Message, MessageReader, encode_tensor, seal_message, sealed_sizes
from tightbeam.common.wire.status import status_details
from tightbeam.common.wire.stepping import (
    GRADIENT,
    HIDDEN,
    KINDS,
    SESSION_KEY,
    TENANT_KEY,
    content_sha256,
    header_segments,
)
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["BackboneService"]

_log = logging.getLogger(__name__)
_STEPS_IN_FLIGHT = 8  # per stream; a client that sends more waits
_SESSION_WAIT_S = 60.0  # between a handshake and its stream
_UNEXPECTED = TightbeamError(
    "The cloud failed on this step.", cure="Its operator finds why in the cloud's log."
)
# what a request may carry; a backward brings its inputs along when the cloud lost them
_TENSORS = {pb.FORWARD: [[HIDDEN]], pb.BACKWARD: [[GRADIENT], [GRADIENT, HIDDEN]]}

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class _Opening:
    """A session whose stream has not come yet."""

    session: Session
    span: range
    expires_s: float


class BackboneService:
    """Implements `tightbeam.v1.Backbone`."""

    def __init__(
        self,
        backbone: Backbone,
        engine: Engine,
        ledger: Ledger,
        keys: CloudKeys,
        trust: Trust,
        *,
        tls: bool,
        max_tokens_per_step: int,
        prices: Prices,
    ) -> None:
        self._backbone, self._engine, self._ledger = backbone, engine, ledger
        self._keys, self._trust, self._tls = keys, trust, tls
        self._max_tokens = max_tokens_per_step
        self._card = make_card(backbone, max_tokens_per_step, prices)
        self._openings: dict[bytes, _Opening] = {}
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="codec")
        self._answering: set[asyncio.Task[None]] = set()
        self._draining = False

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing new and wait for the running steps; an edge whose step is refused reconnects."""
        self._draining = True
        if self._answering:
            await asyncio.wait(self._answering, timeout=timeout_s)

    async def describe(self, request: pb.DescribeRequest, context: Context) -> pb.Card:
        """The card, with the current key bundle."""
        card = pb.Card()
        card.CopyFrom(self._card)
        card.key_bundle.CopyFrom(self._keys.bundle)
        return card

    async def download(
        self, request: pb.DownloadRequest, context: Context
    ) -> AsyncIterator[pb.DownloadChunk]:
        """One blob from any offset."""
        blob = self._backbone.blobs_by_hash.get(request.sha256)
        if blob is None or request.offset > blob.num_bytes:
            await _abort(
                context, UsageError("This cloud has no such blob.", cure="Ask Describe for its blobs.")
            )
            return
        pieces = blob.read(request.offset)
        loop = asyncio.get_running_loop()
        while (piece := await loop.run_in_executor(self._pool, next, pieces, None)) is not None:
            yield pb.DownloadChunk(data=piece)

    async def handshake(self, request: pb.HandshakeRequest, context: Context) -> pb.HandshakeReply:
        """Agree on the keys of one stream, for one run at one cut of this backbone."""
        try:
            self._check_open()
            span = self._backbone.policy.check(Cut.parse(request.cut), self._backbone.trunk.num_blocks)
            if request.fingerprint != self._backbone.fingerprint:
                raise FingerprintError(
                    f"The edge expects the backbone {request.fingerprint[:12]}, this cloud serves "
                    f"{self._backbone.fingerprint[:12]}.",
                    cure="Load the model again from this cloud, or connect to the one it came from.",
                )
            reply, session = self._keys.accept(request, self._trust)
            if self._tls and session.peer != self._caller(context):
                raise IdentityError(
                    "The handshake and the TLS certificate name different tenants.",
                    cure="Use one identity folder for both.",
                )
        except TightbeamError as error:
            await _abort(context, error)
            raise AssertionError from error
        now = time.monotonic()
        self._openings = {key: o for key, o in self._openings.items() if o.expires_s > now}
        self._openings[session.session_id] = _Opening(session, span, now + _SESSION_WAIT_S)
        return reply

    async def usage(self, request: pb.UsageRequest, context: Context) -> pb.UsageReply:
        """The caller's runs, from the ledger."""
        try:
            tenant = self._caller(context)
        except TightbeamError as error:
            await _abort(context, error)
            raise AssertionError from error
        rows = await self._in_pool(self._ledger.usage, tenant, list(request.runs) or None)
        return pb.UsageReply(
            runs=[
                pb.RunUsage(
                    run=row.run,
                    forward_steps=row.forward_steps,
                    backward_steps=row.backward_steps,
                    tokens=row.tokens,
                    bytes=_receipt(row.bytes),
                    flops=row.flops,
                    compute_s=row.compute_s,
                    reexecuted_steps=row.reexecuted_steps,
                )
                for row in rows
            ]
        )

    async def steps(self, records: AsyncIterator[bytes], context: Context) -> None:
        """One session's stream: sealed requests in, sealed replies out, each step on its own."""
        opening = self._open(context)
        if opening is None:
            await _abort(context, IdentityError("This stream has no session.", cure="Do a handshake first."))
            return
        session = opening.session
        reader = MessageReader(session.opener, pb.StepRequest, self._admit)
        writing, in_flight = asyncio.Lock(), asyncio.Semaphore(_STEPS_IN_FLIGHT)
        running: set[asyncio.Task[None]] = set()
        _log.info("stream of %s, run %r, cut %s", session.peer, session.run, session.cut)
        try:
            async for record in records:
                message = reader.feed(record)
                if message is not None:
                    await in_flight.acquire()
                    task = asyncio.create_task(self._answer(message, opening, context, writing, in_flight))
                    for tasks in (running, self._answering):
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
            if running:
                await asyncio.wait(running)
        except TightbeamError as error:
            _log.warning("stream of %s closed: %s", session.peer, error.message)
            await _abort(context, error)
        finally:
            for task in running:
                task.cancel()
            if not self._draining:
                self._engine.forget_session(session.session_id.hex())

    async def _answer(
        self,
        message: Message[pb.StepRequest],
        opening: _Opening,
        context: Context,
        writing: asyncio.Lock,
        in_flight: asyncio.Semaphore,
    ) -> None:
        # An error that is not ours still gets an answer, or the edge would wait for ever; asyncio logs it.
        reply, payloads = _failure(message.header, _UNEXPECTED), list[Tensor]()
        try:
            reply, payloads = await self._step(message, opening)
        except TightbeamError as error:
            reply = _failure(message.header, error)
        finally:
            in_flight.release()
            async with writing:
                for record in seal_message(reply.SerializeToString(), payloads, opening.session.sealer):
                    await context.write(record)

    async def _step(
        self, message: Message[pb.StepRequest], opening: _Opening
    ) -> tuple[pb.StepReply, list[Tensor]]:
        self._check_open()
        header, session = message.header, opening.session
        segments = header_segments(header)
        key = (session.session_id.hex(), session.run, header.step)
        sha256 = await self._in_pool(content_sha256, header, session.cut, message.payloads[0])
        if header.kind == pb.FORWARD:
            hidden_ND = await self._in_pool(message.tensor, HIDDEN)
            done = await self._engine.forward(key, hidden_ND, segments, opening.span, keep=header.keep)
            name = HIDDEN
        else:
            grad_ND = await self._in_pool(message.tensor, GRADIENT)
            inputs_ND = await self._in_pool(message.tensor, HIDDEN) if message.has(HIDDEN) else None
            done = await self._engine.backward(key, grad_ND, inputs_ND, segments, opening.span)
            name = GRADIENT
        spec, payload = await self._in_pool(encode_tensor, name, done.tensor_ND, header.reply_codec)
        reply = pb.StepReply(
            step=header.step, kind=header.kind, tensors=[spec],
            queue_s=done.queue_s, compute_s=done.compute_s, flops=done.flops,
        )  # fmt: skip
        moved = self._measure(message, reply, payload)
        billed = await self._in_pool(self._ledger.record, _entry(header, session, sha256.hex(), done, moved))
        if billed.before is not None:
            reply.billed_before.CopyFrom(_receipt(billed.before))
        return reply, [payload]

    def _measure(self, message: Message[pb.StepRequest], reply: pb.StepReply, payload: Tensor) -> StepBytes:
        down = sealed_sizes(reply.SerializeToString(), [payload.numel()])
        return StepBytes(
            payload_up_bytes=message.payload_bytes,
            payload_down_bytes=payload.numel(),
            sealed_up_bytes=sum(message.sealed_sizes),
            sealed_down_bytes=sum(down),
            wire_up_bytes=wire_bytes(message.sealed_sizes, tls=self._tls),
            wire_down_bytes=wire_bytes(down, tls=self._tls),
        )

    def _check_open(self) -> None:
        if self._draining:
            raise CloudUnavailableError(
                "This cloud is shutting down.", cure="Retry: another may take its place."
            )

    def _admit(self, header: pb.StepRequest) -> None:
        """Refuse a request by its header, before memory is taken for its tensors."""
        num_tokens = sum(header.lengths)
        if num_tokens > self._max_tokens:
            raise StepTooLargeError(
                f"A step of {num_tokens} tokens is over this cloud's limit of {self._max_tokens}.",
                cure="Use a smaller batch or shorter sequences.",
            )
        names = [spec.name for spec in header.tensors]
        if names not in _TENSORS.get(header.kind, []):
            raise ProtocolError(f"A step of kind {header.kind} with tensors {names} is not understood.")
        shape = [num_tokens, self._backbone.trunk.hidden_size]
        if any(list(spec.shape) != shape for spec in header.tensors):
            raise ProtocolError(f"The tensors of a step of {num_tokens} tokens must have the shape {shape}.")
        limit = self._card.limits.max_positions
        if any(
            start + count > limit for start, count in zip(header.run_starts, header.run_lengths, strict=False)
        ):
            raise StepTooLargeError(
                f"A position is beyond the {limit} that this model was built for.",
                cure="Use shorter sequences.",
            )

    def _open(self, context: Context) -> _Opening | None:
        metadata = dict(context.invocation_metadata() or ())
        name = metadata.get(SESSION_KEY, "")
        try:
            opening = self._openings.pop(bytes.fromhex(str(name)), None)
        except ValueError:
            return None
        return opening if opening is not None and opening.expires_s > time.monotonic() else None

    def _caller(self, context: Context) -> str:
        """The tenant of a unary call: the TLS client certificate's name, or what an insecure caller says."""
        if not self._tls:
            metadata = dict(context.invocation_metadata() or ())
            return f"insecure/{metadata.get(TENANT_KEY)!s}"
        names: Iterable[bytes] = context.auth_context().get("x509_subject_alternative_name", [])
        for name in names:
            if name.startswith(b"tightbeam://tenant/"):
                return name.decode().removeprefix("tightbeam://tenant/")
        raise IdentityError(
            "The client certificate names no tenant.", cure="Make one with `tightbeam certs init`."
        )

    async def _in_pool(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _entry(
    header: pb.StepRequest, session: Session, sha256: str, done: Done, moved: StepBytes
) -> LedgerEntry:
    return LedgerEntry(
        tenant=session.peer,
        run=session.run,
        step=header.step,
        kind=KINDS[header.kind],
        request_sha256=sha256,
        tokens=sum(header.lengths),
        segments=len(header.lengths),
        bytes=moved,
        flops=done.flops,
        queue_s=done.queue_s,
        compute_s=done.compute_s,
        retention=done.retention,
    )


def _failure(header: pb.StepRequest, error: TightbeamError) -> pb.StepReply:
    failure = pb.Failure(code=error.code, message=error.message, cure=error.cure)
    return pb.StepReply(step=header.step, kind=header.kind, failure=failure)


def _receipt(moved: StepBytes) -> pb.Receipt:
    return pb.Receipt(
        payload_up_bytes=moved.payload_up_bytes,
        payload_down_bytes=moved.payload_down_bytes,
        sealed_up_bytes=moved.sealed_up_bytes,
        sealed_down_bytes=moved.sealed_down_bytes,
        wire_up_bytes=moved.wire_up_bytes,
        wire_down_bytes=moved.wire_down_bytes,
    )


async def _abort(context: Context, error: TightbeamError) -> None:
    await context.abort(grpc.StatusCode[error.status], status_details(error))
