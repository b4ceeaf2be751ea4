"""One step in the cloud, from an opened request to a reply that may be sealed.

Codecs, hashes and the ledger run in a thread pool; the engine's one worker owns the device. The ledger row is
durable before `StepRunner.run` returns, so before its reply leaves.
"""

import asyncio
import math
import weakref
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from tightbeam.cloud.engine import Done, Engine
from tightbeam.cloud.ledger import Ledger, LedgerEntry
from tightbeam.cloud.repeats import Repeats
from tightbeam.cloud.retention import StepKey
from tightbeam.cloud.tapping import TapRules
from tightbeam.cloud.turns import TurnPool
from tightbeam.common.accounts.framing import wire_bytes
from tightbeam.common.accounts.rows import StepBytes
from tightbeam.common.backbone import Segments, tap_name
from tightbeam.common.errors import CloudUnavailableError, ProtocolError, StepTooLargeError
from tightbeam.common.wire.codecs import codec
from tightbeam.common.wire.handshake import Session
from tightbeam.common.wire.messages import Message, encode_tensor, sealed_sizes
from tightbeam.common.wire.prefixes import RowMap, SharedPrefixes
from tightbeam.common.wire.stepping import (
    GRADIENT,
    HIDDEN,
    KINDS,
    billed_records,
    content_sha256,
    header_segments,
    rounding_seed,
    tensor_sha256,
)
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["StepRunner", "receipt"]

# what a request may carry; a backward brings its inputs along when the cloud lost them
_TENSORS = {pb.FORWARD: [[HIDDEN]], pb.BACKWARD: [[GRADIENT], [GRADIENT, HIDDEN]]}
_DECODED_ITEM_BYTES = 4  # codecs compute in float32
_AT_A_TIME = 2  # steps of one tenant: one on the device, the next one decoding
_MAX_STEP = 2**63 - 1  # that a ledger holds


class StepRunner:
    """Runs the steps of all streams."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        pool: TurnPool,
        *,
        hidden_size: int,
        limits: pb.Limits,
        tap_rules: TapRules,
        tls: bool,
    ) -> None:
        self._engine, self._pool = engine, pool
        self._hidden_size, self._limits, self._tls = hidden_size, limits, tls
        self._tap_rules = tap_rules
        self._draining = False
        self._repeats = Repeats(ledger, pool)
        self._slots = weakref.WeakValueDictionary[str, asyncio.Semaphore]()  # by tenant

    def drain(self) -> None:
        """Start no more steps."""
        self._draining = True

    def forget(self, session: Session) -> None:
        """Free what the steps of a session that ended have left."""
        if not self._draining:
            self._engine.forget_session(session.peer, session.session_id.hex())

    def require_open(self) -> None:
        """Refuse new work while the cloud shuts down."""
        if self._draining:
            raise CloudUnavailableError(
                "This cloud is shutting down.", cure="Retry: another may take its place."
            )

    def admit(self, header: pb.StepRequest, span: range) -> int:
        """Refuse a request by its header, before memory is taken for its tensors; returns how many bytes.

        Raises `StepTooLargeError` for one that will never be accepted, `ProtocolError` for one that
        contradicts itself, `StepRefusedError` for taps that are not on offer, `CodecError`.
        """
        if header.step > _MAX_STEP:
            raise ProtocolError(f"The step number {header.step} is over {_MAX_STEP}.")
        num_tokens = sum(header.lengths)
        if num_tokens > self._limits.max_tokens_per_step:
            raise StepTooLargeError(
                f"A step of {num_tokens} tokens is over this cloud's limit of "
                f"{self._limits.max_tokens_per_step}.",
                cure="Use a smaller batch or shorter sequences.",
            )
        names = [spec.name for spec in header.tensors]
        if names not in _TENSORS.get(header.kind, []):
            raise ProtocolError(f"A step of kind {header.kind} with tensors {names} is not understood.")
        prefixes = SharedPrefixes.read(header)
        shape = [num_tokens if prefixes is None else prefixes.num_rows, self._hidden_size]
        if any(list(spec.shape) != shape for spec in header.tensors):
            raise ProtocolError(f"The tensors of a step of {num_tokens} tokens must have the shape {shape}.")
        shape[0] = num_tokens  # what is computed on, whatever crossed
        self._admit_positions(header)
        taps = self._tap_rules.check(header, span)
        names = [spec.codec for spec in header.tensors] + [header.reply_codec]
        whole = sum(_footprint(name, shape) for name in names)
        if taps is None:
            return whole
        return whole + len(taps.blocks) * _footprint(header.reply_codec, [num_tokens, taps.size])

    def _admit_positions(self, header: pb.StepRequest) -> None:
        # an entry counts at least one token, so the lists are no longer than the tensors
        if (
            0 in header.lengths
            or 0 in header.run_lengths
            or len(header.run_starts) != len(header.run_lengths)
        ):
            raise ProtocolError("The segments or positions of a step are malformed.")
        limit = self._limits.max_positions
        if any(s + n > limit for s, n in zip(header.run_starts, header.run_lengths, strict=True)):
            raise StepTooLargeError(
                f"A position is beyond the {limit} that this model was built for.",
                cure="Use shorter sequences.",
            )

    async def run(
        self, message: Message[pb.StepRequest], session: Session, span: range
    ) -> tuple[pb.StepReply, list[Tensor]]:
        """Compute and bill one step; gives the reply and its payloads. Raises what `Engine` raises."""
        slots = self._slots.setdefault(session.peer, asyncio.Semaphore(_AT_A_TIME))
        key = session.peer, session.run, message.header.step, KINDS[message.header.kind]
        with self._repeats.alone(key):
            async with slots:
                self.require_open()
                return await self._run(message, session, span, key)

    async def _run(
        self,
        message: Message[pb.StepRequest],
        session: Session,
        span: range,
        key: tuple[str, str, int, str],
    ) -> tuple[pb.StepReply, list[Tensor]]:
        header, pool = message.header, partial(self._pool.run, session.peer)
        digests = [
            await pool(partial(tensor_sha256, spec, payload))
            for spec, payload in zip(header.tensors, message.payloads, strict=True)
        ]
        # of a backward that does not bring its inputs along, they are known when the held step is found
        known = header.kind == pb.FORWARD or len(digests) > 1
        await self._repeats.expect(key, _content(header, session, digests) if known else "")
        prefixes, segments = SharedPrefixes.read(header), header_segments(header)
        rows = None if prefixes is None else await pool(partial(prefixes.row_map, segments.positions_N))
        done = await self._compute(message, session, span, segments, rows, digests[-1])
        if header.kind == pb.BACKWARD:
            digests = [digests[0], done.inputs_sha256]
        coded = await self._encode(header, session, done, rows)
        payloads = [payload for _, payload in coded]
        reply = pb.StepReply(
            step=header.step, kind=header.kind, tensors=[spec for spec, _ in coded],
            queue_s=done.queue_s, compute_s=done.compute_s, flops=done.flops,
        )  # fmt: skip
        moved = await self._measure(message, session, reply, payloads)
        entry = _entry(header, session, _content(header, session, digests), done, moved)
        billed = await self._repeats.bill(entry)
        if billed.before is not None:
            reply.billed_before.CopyFrom(receipt(billed.before))
        return reply, payloads

    async def _compute(
        self,
        message: Message[pb.StepRequest],
        session: Session,
        span: range,
        segments: Segments,
        rows: RowMap | None,
        inputs_sha256: bytes,
    ) -> Done:
        header, pool = message.header, partial(self._pool.run, session.peer)
        key = StepKey(session.peer, session.session_id.hex(), session.run, header.step)
        if header.kind == pb.BACKWARD:
            grad_ND = await pool(partial(message.tensor, GRADIENT))
            hidden_ND = await pool(partial(message.tensor, HIDDEN)) if message.has(HIDDEN) else None
            return await self._engine.backward(key, grad_ND, hidden_ND, segments, span, sha256=inputs_sha256)
        hidden_ND = await pool(partial(message.tensor, HIDDEN))
        if rows is not None:
            hidden_ND = await pool(partial(rows.spread, hidden_ND))
        taps = self._tap_rules.check(header, span)
        if taps is not None:
            return await self._engine.forward_tapped(session.peer, hidden_ND, segments, span, taps)
        return await self._engine.forward(
            key, hidden_ND, segments, span, keep=header.keep, sha256=inputs_sha256
        )

    async def _encode(
        self,
        header: pb.StepRequest,
        session: Session,
        done: Done,
        rows: RowMap | None,
    ) -> list[tuple[pb.TensorSpec, Tensor]]:
        """What goes back: the result, and taps that were asked for; of shared rows those of the first."""
        name = HIDDEN if header.kind == pb.FORWARD else GRADIENT
        seed = rounding_seed(session.run, header.step)
        results = {name: done.tensor_ND} | {tap_name(block): t for block, t in done.taps.items()}
        if rows is not None:
            results = {name: rows.pick(tensor) for name, tensor in results.items()}
        encode = partial(encode_tensor, codec_name=header.reply_codec, seed=seed)
        return [
            await self._pool.run(session.peer, partial(encode, result, tensor))
            for result, tensor in results.items()
        ]

    async def _measure(
        self, message: Message[pb.StepRequest], session: Session, reply: pb.StepReply, payloads: list[Tensor]
    ) -> StepBytes:
        """What the tenant pays for: not for inputs again that its forward has paid for."""
        header, up, payload_up = message.header, message.sealed_sizes, message.payload_bytes
        if header.kind == pb.BACKWARD and message.has(HIDDEN):
            paid = await self._repeats.billed((session.peer, session.run, header.step, KINDS[pb.FORWARD]))
            if paid is not None and paid.tokens == sum(header.lengths):
                up, payload_up = billed_records(header, up), message.payloads[0].numel()
        sizes = [payload.numel() for payload in payloads]
        down = sealed_sizes(reply.SerializeToString(), sizes)
        return StepBytes(
            payload_up_bytes=payload_up,
            payload_down_bytes=sum(sizes),
            sealed_up_bytes=sum(up),
            sealed_down_bytes=sum(down),
            wire_up_bytes=wire_bytes(up, tls=self._tls),
            wire_down_bytes=wire_bytes(down, tls=self._tls),
        )


def _content(header: pb.StepRequest, session: Session, digests: Sequence[bytes]) -> str:
    return content_sha256(header, session.cut, digests).hex()


def _footprint(codec_name: str, shape: list[int]) -> int:
    """Bytes of a tensor coded and decoded."""
    return codec(codec_name).num_bytes(shape) + _DECODED_ITEM_BYTES * math.prod(shape)


def receipt(moved: StepBytes) -> pb.Receipt:
    """The same numbers as a message."""
    return pb.Receipt(
        payload_up_bytes=moved.payload_up_bytes,
        payload_down_bytes=moved.payload_down_bytes,
        sealed_up_bytes=moved.sealed_up_bytes,
        sealed_down_bytes=moved.sealed_down_bytes,
        wire_up_bytes=moved.wire_up_bytes,
        wire_down_bytes=moved.wire_down_bytes,
    )


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
