"""The gRPC service: an async front that never computes.

Follow one step: `BackboneService.steps` here, then `StepStream` (stream.py) for its records, `StepRunner`
(steps.py) for its answer, `Engine` (engine.py) for the device.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from tightbeam.cloud.admission import Opening, Quota, WaitingRoom
from tightbeam.cloud.backbone import Backbone
from tightbeam.cloud.card import make_card
from tightbeam.cloud.engine import Engine
from tightbeam.cloud.ledger import Ledger, RunUsage
from tightbeam.cloud.rpc import Context, abort, caller, require_same_tenant
from tightbeam.cloud.steps import StepRunner, receipt
from tightbeam.cloud.stream import StepStream
from tightbeam.cloud.tapping import TapRules
from tightbeam.common.backbone import Cut
from tightbeam.common.errors import FingerprintError, StaleHandshakeError, TightbeamError, UsageError
from tightbeam.common.identity import Trust
from tightbeam.common.wire.handshake import CloudKeys
from tightbeam.common.wire.stepping import SESSION_KEY
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["BackboneService"]


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
        in_flight_bytes: int = 1 << 30,
    ) -> None:
        self._backbone, self._ledger, self._tls = backbone, ledger, tls
        self._keys, self._trust = keys, trust
        self._card = make_card(backbone, max_tokens_per_step)
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="codec")
        self._runner = StepRunner(
            engine, ledger, self._pool,
            hidden_size=backbone.trunk.hidden_size, limits=self._card.limits,
            tap_rules=TapRules(self._card.tap_offer, backbone.trunk.hidden_size), tls=tls,
        )  # fmt: skip
        self._waiting = WaitingRoom(Quota("sessions without a stream", 512, 16))
        self._open_streams = Quota("open streams", 512, 32)
        self._in_flight_bytes = Quota("bytes of steps in flight", in_flight_bytes, in_flight_bytes // 2)
        self._streams: set[StepStream] = set()

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing new and wait for the running steps; an edge whose step is refused reconnects."""
        self._runner.drain()
        finishing = [asyncio.ensure_future(stream.finish_steps()) for stream in self._streams]
        if finishing:
            await asyncio.wait(finishing, timeout=timeout_s)

    async def describe(self, request: pb.DescribeRequest, context: Context) -> pb.Card:
        """The card, with the current key bundle and the prices in it."""
        card = pb.Card()
        card.CopyFrom(self._card)
        card.key_bundle.CopyFrom(self._keys.bundle)
        if card.key_bundle.HasField("prices"):
            card.prices.CopyFrom(card.key_bundle.prices)
        return card

    async def download(
        self, request: pb.DownloadRequest, context: Context
    ) -> AsyncIterator[pb.DownloadChunk]:
        """One blob from any offset."""
        blob = self._backbone.blobs_by_hash.get(request.sha256)
        if blob is None or request.offset > blob.num_bytes:
            await abort(
                context, UsageError("This cloud has no such blob.", cure="Ask Describe for its blobs.")
            )
        pieces = blob.read(request.offset)
        loop = asyncio.get_running_loop()
        while (piece := await loop.run_in_executor(self._pool, next, pieces, None)) is not None:
            yield pb.DownloadChunk(data=piece)

    async def handshake(self, request: pb.HandshakeRequest, context: Context) -> pb.HandshakeReply:
        """Agree on the keys of one stream, for one run at one cut of this backbone.

        Who does not prove to be a tenant learns nothing but that.
        """
        try:
            self._runner.require_open()
            reply, session = self._keys.accept(request, self._trust)
            if self._tls:
                require_same_tenant(context, session.peer)
            if session.fingerprint != self._backbone.fingerprint:
                raise FingerprintError(
                    f"The edge expects the backbone {session.fingerprint[:12]}, this cloud serves "
                    f"{self._backbone.fingerprint[:12]}.",
                    cure="Load the model again from this cloud, or connect to the one it came from.",
                )
            span = self._backbone.policy.check(Cut.parse(session.cut), self._backbone.trunk.num_blocks)
            self._waiting.put(session, span)
        except TightbeamError as error:
            await abort(context, error)
        return reply

    async def usage(self, request: pb.UsageRequest, context: Context) -> pb.UsageReply:
        """The caller's runs, from the ledger."""
        try:
            tenant = caller(context, tls=self._tls)
        except TightbeamError as error:
            await abort(context, error)
        loop, runs = asyncio.get_running_loop(), list(request.runs) or None
        rows = await loop.run_in_executor(self._pool, self._ledger.usage, tenant, runs)
        return pb.UsageReply(runs=[_usage(row) for row in rows])

    async def steps(self, records: AsyncIterator[bytes], context: Context) -> None:
        """The stream of one session."""
        try:
            opening = self._open(context)
            tenant = opening.session.peer
            self._open_streams.take(tenant)
        except TightbeamError as error:
            await abort(context, error)
        stream = StepStream(opening, self._runner, self._in_flight_bytes, context)
        self._streams.add(stream)
        try:
            await stream.serve(records)
        finally:
            self._streams.discard(stream)
            self._open_streams.give(tenant)

    def _open(self, context: Context) -> Opening:
        name = str(dict(context.invocation_metadata() or ()).get(SESSION_KEY, ""))
        opening = self._waiting.take(name)
        if opening is None:
            raise StaleHandshakeError(
                "This stream has no session: the cloud restarted, or the handshake is too long ago.",
                cure="Do a handshake first.",
            )
        if self._tls:
            require_same_tenant(context, opening.session.peer)
        return opening


def _usage(row: RunUsage) -> pb.RunUsage:
    return pb.RunUsage(
        run=row.run,
        forward_steps=row.forward_steps,
        backward_steps=row.backward_steps,
        tokens=row.tokens,
        bytes=receipt(row.bytes),
        flops=row.flops,
        compute_s=row.compute_s,
        reexecuted_steps=row.reexecuted_steps,
    )
