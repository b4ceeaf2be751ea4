"""The gRPC service: an async front that never computes.

Follow one step: `BackboneService.steps` here, then `StepStream` (stream.py) for its records, `StepRunner`
(steps.py) for its answer, `Engine` (engine.py) for the device.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from functools import partial

from tightbeam.cloud.admission import Opening, Quota, WaitingRoom
from tightbeam.cloud.backbone import Backbone
from tightbeam.cloud.card import make_card
from tightbeam.cloud.engine import Engine
from tightbeam.cloud.ledger import USAGE_PAGE, Ledger, RunUsage
from tightbeam.cloud.rpc import Context, abort, caller, require_same_tenant
from tightbeam.cloud.steps import StepRunner, receipt
from tightbeam.cloud.stream import StepStream, write
from tightbeam.cloud.tapping import TapRules
from tightbeam.cloud.turns import TurnPool
from tightbeam.common.backbone import Cut
from tightbeam.common.errors import (
    FingerprintError,
    StaleHandshakeError,
    TightbeamError,
    UsageError,
)
from tightbeam.common.identity.identities import Trust
from tightbeam.common.wire.handshake import CloudKeys
from tightbeam.common.wire.stepping import SESSION_KEY
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["BackboneService"]

_MAX_USAGE_RUNS = 100  # named in one question
_QUESTION_S = 0.2  # at least, each: a page takes a few milliseconds of what steps need


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
        self._pool = TurnPool(4, "codec")
        self._files = TurnPool(2, "files")  # downloads and usage: steps do not wait for them
        self._runner = StepRunner(
            engine, ledger, self._pool,
            hidden_size=backbone.trunk.hidden_size, limits=self._card.limits,
            tap_rules=TapRules(self._card.tap_offer, backbone.trunk.hidden_size), tls=tls,
        )  # fmt: skip
        self._waiting = WaitingRoom(Quota("sessions without a stream", 512, 16))
        self._open_streams = Quota("open streams", 512, 32)
        self._calls = Quota("downloads and questions at a time", 64, 8)
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

    async def download(self, request: pb.DownloadRequest, context: Context) -> None:
        """One blob from any offset."""
        try:
            with self._call(context) as tenant:
                blob = self._backbone.blobs_by_hash.get(request.sha256)
                if blob is None or request.offset > blob.num_bytes:
                    raise UsageError("This cloud has no such blob.", cure="Ask Describe for its blobs.")
                pieces = blob.read(request.offset)
                while (piece := await self._files.run(tenant, partial(next, pieces, None))) is not None:
                    await write(context, pb.DownloadChunk(data=piece))
        except TightbeamError as error:
            await abort(context, error)

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
            if not session.run.isprintable():
                raise UsageError("The run's name holds control characters.", cure="Use letters and digits.")
            span = self._backbone.policy.check(Cut.parse(session.cut), self._backbone.trunk.num_blocks)
            self._waiting.put(session, span)
        except TightbeamError as error:
            await abort(context, error)
        return reply

    async def usage(self, request: pb.UsageRequest, context: Context) -> pb.UsageReply:
        """A page of the caller's runs, from the ledger."""
        try:
            with self._call(context) as tenant:
                if len(request.runs) > _MAX_USAGE_RUNS:
                    raise UsageError(f"Usage of more than {_MAX_USAGE_RUNS} runs was asked at once.")
                reply = await self._files.run(tenant, partial(self._usage_page, tenant, request))
                await asyncio.sleep(_QUESTION_S)
        except TightbeamError as error:
            await abort(context, error)
        return reply

    def _usage_page(self, tenant: str, request: pb.UsageRequest) -> pb.UsageReply:
        rows = self._ledger.usage(tenant, list(request.runs), after=request.after)
        return pb.UsageReply(runs=[_usage(row) for row in rows], more=len(rows) == USAGE_PAGE)

    @contextlib.contextmanager
    def _call(self, context: Context) -> Iterator[str]:
        """The tenant of a call beside the steps, counted while it lasts."""
        tenant = caller(context, tls=self._tls)
        self._calls.take(tenant)
        try:
            yield tenant
        finally:
            self._calls.give(tenant)

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
