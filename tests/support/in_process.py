"""A whole cloud inside the test process: the real service, engine, ledger, handshake and sealed records.

Steps reach it through memory (`open_channel`, no network at all) or through gRPC on loopback (`listen`).
`FaultyChannel` puts a script of faults in front of any channel, so that every loss can be told in one line.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar, cast

import grpc
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tightbeam.cloud.backbone import load_backbone
from tightbeam.cloud.card import make_card
from tightbeam.cloud.engine import Engine
from tightbeam.cloud.ledger import Ledger
from tightbeam.cloud.projections import ProjectionOptions
from tightbeam.cloud.retention import Retention
from tightbeam.cloud.server import _OPTIONS, _handlers
from tightbeam.cloud.service import BackboneService
from tightbeam.common.accounts.framing import wire_bytes
from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.common.backbone import Cut, CutPolicy
from tightbeam.common.errors import (
    CloudBusyError,
    CloudUnavailableError,
    IntegrityError,
    ProtocolError,
    TightbeamError,
)
from tightbeam.common.identity.identities import Role, ephemeral_identity
from tightbeam.common.wire.handshake import ClientHandshake, CloudKeys, Session
from tightbeam.common.wire.key_schedule import card_digest
from tightbeam.common.wire.messages import Message, MessageReader, seal_message
from tightbeam.common.wire.status import error_from_details
from tightbeam.common.wire.stepping import SESSION_KEY, billed_records
from tightbeam.edge.link.carrier import RetryPolicy
from tightbeam.edge.link.channel import Channel, Exchange
from tightbeam.edge.link.stepper import Stepper
from tightbeam.edge.model.split_model import build_split_model
from tightbeam.edge.model.weights import BlobStore
from tightbeam.edge.recipe import Codecs
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["Fault", "FaultyChannel", "InProcessChannel", "InProcessCloud"]

T = TypeVar("T")
_NO_WAIT = RetryPolicy(first_wait_s=0.0, longest_wait_s=0.0, give_up_after_s=20.0)


class InProcessCloud:
    """Everything that `tightbeam serve` runs, on a thread of this process."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        retention_bytes: int = 1 << 28,
        max_tokens_per_step: int = 4096,
        cut_policy: str = "",
        projection: ProjectionOptions | None = None,
        prices: pb.Prices | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cloud", daemon=True)
        self._thread.start()
        self.backbone = load_backbone(
            str(model), CutPolicy.parse(cut_policy), device="cpu", dtype="auto", projection=projection
        )
        self.retention = Retention(retention_bytes, self.backbone.graph_bytes)
        self.engine = Engine(
            self.backbone.trunk, self.retention, self.backbone.dtype, self.backbone.projections
        )
        self.ledger = Ledger(folder / "ledger.db")
        identity = ephemeral_identity("cloud", Role.CLOUD)
        self.service = BackboneService(
            self.backbone,
            self.engine,
            self.ledger,
            CloudKeys.generate(
                identity,
                self.backbone.fingerprint,
                prices=prices,
                card_digest=card_digest(make_card(self.backbone, max_tokens_per_step)),
            ),
            identity.trust,
            tls=False,
            max_tokens_per_step=max_tokens_per_step,
        )
        self.address = ""  # of `listen`
        self._server: grpc.aio.Server | None = None
        self._steppers: list[Stepper] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop everything; the ledger's file stays."""
        self.hang_up()
        if self._server is not None:
            self.run(self._server.stop(0.0))
        self.run(self.service.drain(5.0))
        self.run(_end_tasks())
        self.engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()
        self.ledger.close()

    def hang_up(self) -> None:
        """End the streams of all steppers so far: one tenant may have 32 at a time."""
        for stepper in self._steppers:
            stepper.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the cloud's event loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    def forget_steps(self) -> None:
        """Lose what is held between forward and backward, as a restart does."""
        self.engine._worker.submit("", self.retention.clear).result(timeout=60)

    def listen(self) -> str:
        """Serve gRPC on a free port of loopback, without TLS; gives "host:port"."""

        async def start() -> int:
            self._server = grpc.aio.server(options=_OPTIONS)
            self._server.add_generic_rpc_handlers((_handlers(self.service),))
            port = self._server.add_insecure_port("127.0.0.1:0")
            await self._server.start()
            return port

        self.address = f"127.0.0.1:{self.run(start())}"
        return self.address

    @property
    def card(self) -> pb.Card:
        """What Describe answers."""
        return self.run(self.service.describe(pb.DescribeRequest(), cast(Any, None)))

    def open_channel(self, run: str, cut: str, tenant: str = "edge") -> "InProcessChannel":
        """A handshake and its stream, through memory."""
        card, identity = self.card, ephemeral_identity(tenant)
        shake = ClientHandshake(
            card.key_bundle, identity, identity.trust, cut=cut, fingerprint=card.fingerprint, run=run
        )
        reply = self.run(self.service.handshake(shake.request, cast(Any, _Wire(()))))
        return InProcessChannel(self, shake.finish(reply))

    def stepper(
        self,
        run: str,
        cut: str = "1:2",
        *,
        codec: str | Codecs = "fp32",
        faults: "deque[Fault] | None" = None,
        on_row: Callable[[StepRow], None] = lambda row: None,
        policy: RetryPolicy = _NO_WAIT,
        on_retry: Callable[[str], None] = lambda line: None,
        numbers: Iterator[int] | None = None,
        share_prefixes: bool = True,
    ) -> Stepper:
        """The edge's stepper over in-process channels, each with the same script of faults."""

        def open_channel() -> Channel:
            channel = self.open_channel(run, cut)
            return channel if faults is None else FaultyChannel(channel, faults, self.forget_steps)

        codecs = Codecs.model_validate(codec)
        stepper = Stepper(
            run,
            open_channel,
            codecs,
            trunk_dtype=self.card.dtype,
            max_tokens_per_step=self.card.limits.max_tokens_per_step,
            share_prefixes=share_prefixes,
            on_row=on_row,
            on_retry=on_retry,
            policy=policy,
            numbers=numbers,
        )
        self._steppers.append(stepper)
        return stepper

    def load_model(self, stepper: Stepper, cut: str = "1:2") -> PreTrainedModel:
        """The split model over a stepper of this cloud."""
        return build_split_model(
            self.card,
            Cut.parse(cut),
            stepper,
            BlobStore(self._folder / "cache", lambda blob, offset: self.fetch(blob.sha256, offset)),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def fetch(self, sha256: str, offset: int) -> Iterator[bytes]:
        """A blob from an offset on, as Download streams it."""
        return self.backbone.blobs_by_hash[sha256].read(offset)


class _AbortedError(Exception):
    """What `abort` raises, as gRPC's own does."""


@dataclass
class _Wire:
    """The part of a gRPC context that the service uses, over memory."""

    metadata: tuple[tuple[str, str], ...]
    deliver: Callable[[bytes], None] = lambda record: None
    error: TightbeamError | None = None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata

    async def write(self, record: bytes) -> None:
        self.deliver(record)

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self.error = error_from_details(details) or ProtocolError(details)
        raise _AbortedError if self.metadata else self.error


@dataclass
class _Asked:
    header: pb.StepRequest
    payload_bytes: int
    future: Future[Exchange]
    sealed_sizes: list[int] = field(default_factory=list)


async def _end_tasks() -> None:
    """Streams that nobody closed: collected while they wait, they complain in another test."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class InProcessChannel:
    """A `Channel` whose records go through memory into the real service and back."""

    def __init__(self, cloud: InProcessCloud, session: Session) -> None:
        self._cloud, self._session = cloud, session
        self._records: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._asked: dict[tuple[int, int], _Asked] = {}
        self._lock = threading.Lock()
        self._failure: TightbeamError | None = None
        self._reader = MessageReader(session.opener, pb.StepReply, lambda header: None)
        self._wire = _Wire(((SESSION_KEY, session.session_id.hex()),), self._receive)
        self._stream = asyncio.run_coroutine_threadsafe(self._serve(), cloud._loop)

    def submit(self, header: pb.StepRequest, payloads: list[Tensor]) -> Future[Exchange]:
        """Seal and send a request."""
        future: Future[Exchange] = Future()
        with self._lock:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            counted = payloads[:1] if header.kind == pb.BACKWARD else payloads
            asked = _Asked(header, sum(p.numel() for p in counted), future)
            self._asked[header.step, header.kind] = asked
            for record in seal_message(header.SerializeToString(), payloads, self._session.sealer):
                asked.sealed_sizes.append(len(record))
                self.send(record)
        return future

    def send(self, record: bytes | None) -> None:
        """Put one record (None: the end) on the wire."""
        self._cloud._loop.call_soon_threadsafe(self._records.put_nowait, record)

    def close(self) -> None:
        """End the stream; what is pending fails."""
        self._fail(CloudUnavailableError("This connection was closed."))
        self.send(None)
        self._stream.result(timeout=30)

    async def _serve(self) -> None:
        try:
            await self._cloud.service.steps(self._arriving(), cast(Any, self._wire))
        except _AbortedError:
            assert self._wire.error is not None
            self._fail(self._wire.error)
        self._fail(CloudUnavailableError("The cloud closed the stream."))

    async def _arriving(self) -> AsyncIterator[bytes]:
        while (record := await self._records.get()) is not None:
            yield record

    def _receive(self, record: bytes) -> None:
        message = self._reader.feed(record)
        if message is not None:
            with self._lock:
                asked = self._asked.pop((message.header.step, message.header.kind), None)
            if asked is not None:
                asked.future.set_result(_exchange(asked, message))

    def _fail(self, error: TightbeamError) -> None:
        with self._lock:
            self._failure = self._failure or error
            pending, self._asked = list(self._asked.values()), {}
        for asked in pending:
            asked.future.set_exception(error)


def _exchange(asked: _Asked, message: Message[pb.StepReply]) -> Exchange:
    up = billed_records(asked.header, asked.sealed_sizes)
    moved = StepBytes(
        payload_up_bytes=asked.payload_bytes,
        payload_down_bytes=message.payload_bytes,
        sealed_up_bytes=sum(up),
        sealed_down_bytes=sum(message.sealed_sizes),
        wire_up_bytes=wire_bytes(up, tls=False),
        wire_down_bytes=wire_bytes(message.sealed_sizes, tls=False),
    )
    return Exchange(message, moved, 0.0, 0.0, wire_bytes(asked.sealed_sizes[len(up) :], tls=False))


class Fault(Enum):
    """What happens to one submitted request."""

    NONE = "it passes"
    UNREACHABLE = "it never arrives"
    REPLY_LOST = "the cloud executes and bills it, the reply is lost"
    STEP_LOST = "the cloud forgets all steps just before"
    BUSY = "the cloud is over a limit"
    ALTERED = "a record does not authenticate"


class FaultyChannel:
    """A `Channel` that takes one fault from the script for every request; an empty script is no fault."""

    def __init__(self, inner: Channel, script: deque[Fault], forget_steps: Callable[[], None]) -> None:
        self._inner, self._script, self._forget_steps = inner, script, forget_steps

    def submit(self, header: pb.StepRequest, payloads: list[Tensor]) -> Future[Exchange]:
        """Send a request, or do to it what the script says."""
        fault = self._script.popleft() if self._script else Fault.NONE
        failed: Future[Exchange] = Future()
        if fault is Fault.STEP_LOST:
            self._forget_steps()
        elif fault is Fault.REPLY_LOST:
            self._inner.submit(header, payloads).result(timeout=60)
            failed.set_exception(CloudUnavailableError("The reply was lost."))
            return failed
        elif fault is not Fault.NONE:
            failed.set_exception(_ERRORS[fault])
            return failed
        return self._inner.submit(header, payloads)

    def close(self) -> None:
        """Close the channel behind."""
        self._inner.close()


_ERRORS = {
    Fault.UNREACHABLE: CloudUnavailableError("The cloud does not answer."),
    Fault.BUSY: CloudBusyError("The cloud is over a limit."),
    Fault.ALTERED: IntegrityError("A record does not authenticate."),
}
