"""`connect()`: the edge's way to one cloud."""

import itertools
import json
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tightbeam.common.accounts.prices import PriceList
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.addresses import is_loopback, split_address
from tightbeam.common.backbone import Cut, CutPolicy
from tightbeam.common.devices import choose_device, choose_dtype
from tightbeam.common.errors import (
    CloudUnavailableError,
    FingerprintError,
    IdentityError,
    ProtocolError,
    UsageError,
)
from tightbeam.common.files import cache_folder
from tightbeam.common.identity.identities import Identity, Role, ephemeral_identity, load_identity
from tightbeam.common.wire.codecs import lossless
from tightbeam.common.wire.handshake import ClientHandshake, verify_bundle
from tightbeam.common.wire.lines import LIVENESS, PATIENCE_S
from tightbeam.common.wire.records import CHUNK_BYTES, PROTOCOL
from tightbeam.common.wire.stepping import TENANT_KEY
from tightbeam.edge.cache.keys import identity_secret
from tightbeam.edge.link.carrier import RetryPolicy
from tightbeam.edge.link.channel import Channel, GrpcChannel, error_from_rpc
from tightbeam.edge.link.downloads import Downloads
from tightbeam.edge.link.offer import asked_by, require_same, require_signed
from tightbeam.edge.link.stepper import Stepper
from tightbeam.edge.link.usage import usage_pages
from tightbeam.edge.model.split_model import build_split_model
from tightbeam.edge.model.weights import BlobStore, Progress, check_card
from tightbeam.edge.recipe import Codecs
from tightbeam.edge.side import add_side, load_side
from tightbeam.proto import backbone_pb2 as pb
from tightbeam.proto.backbone_pb2_grpc import BackboneStub

__all__ = ["Cloud", "connect"]

_GREETING_S = 30.0  # for the first answer of a cloud
_OPTIONS: list[tuple[str, Any]] = [
    *LIVENESS,
    ("grpc.max_receive_message_length", CHUNK_BYTES + 65536),
    ("grpc.enable_retries", 0),  # a step is sent again by the stepper, sealed afresh
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


def connect(
    address: str,
    *,
    identity: str | Path | None = None,
    insecure: bool = False,
    name: str = "edge",
    run: str | None = None,
    fingerprint: str | None = None,
    wait_s: float = 10.0,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    on_retry: Callable[[str], None] = print,
    on_send: Callable[[dict[str, Any]], None] = lambda row: None,
    on_download: Progress = lambda name, done, total: None,
    policy: RetryPolicy | None = None,
) -> "Cloud":
    """Connect to the cloud at `address` ("host:port").

    Args:
        address: Where `tightbeam serve` listens.
        identity: Folder made by `tightbeam certs init`, e.g. "certs/clinic".
        insecure: No TLS and no identities; loopback only. Steps are sealed all the same.
        name: What an insecure edge calls itself.
        run: Name of this training job in both accounts; made up when absent. Never use one twice.
        fingerprint: Refuse any other backbone.
        wait_s: How long to wait for the cloud to answer at all.
        on_row: Gets every row of the accounts, as `ledger.jsonl` holds them.
        on_retry: Gets a line for every retry.
        on_send: Gets a row before every step leaves: what a killed process may be billed for.
        on_download: Gets the progress of weight downloads in bytes.
        policy: How long transient failures are retried.

    Raises:
        IdentityError: No identity, or TLS refuses it.
        UsageError: An identity, and `insecure` beside it.
        CloudUnavailableError: No answer within `wait_s`.
        FingerprintError: Another backbone than `fingerprint`.
    """
    split_address(address)
    if insecure and identity is not None:
        raise UsageError("insecure and an identity exclude each other.", cure="Leave out insecure.")
    if insecure and not is_loopback(address):
        raise UsageError(
            f"insecure is refused for {address}: it is not a loopback address.",
            cure="Make identities with `tightbeam certs init` and give one.",
        )
    if insecure:
        who, channel = ephemeral_identity(name), grpc.insecure_channel(address, options=_OPTIONS)
    elif identity is None:
        raise IdentityError(
            "An identity is needed to connect.",
            cure="Give the folder certs/NAME that `tightbeam certs init` made (model.identity in a recipe), "
            "or connect insecure on loopback.",
        )
    else:
        who = load_identity(Path(identity))
        if who.role is not Role.TENANT:
            raise IdentityError(
                f"{identity} is the cloud's identity.", cure="Give this edge a folder of its own."
            )
        assert who.tls is not None
        credentials = grpc.ssl_channel_credentials(who.tls.ca, who.tls.key, who.tls.certificate)
        channel = grpc.secure_channel(address, credentials, options=_OPTIONS)
    cloud = Cloud(
        channel, who, run or f"{who.name}-{uuid.uuid4().hex[:8]}",
        tls=not insecure, on_row=on_row, on_retry=on_retry, on_send=on_send, on_download=on_download,
        policy=policy,
    )  # fmt: skip
    try:
        cloud._describe(wait_s)
        if fingerprint is not None and cloud.card.fingerprint != fingerprint:
            raise FingerprintError(
                f"{address} serves the backbone {cloud.card.fingerprint[:12]}, not {fingerprint[:12]}.",
                cure="Connect to the cloud that serves the wanted backbone, or drop the fingerprint.",
            )
    except BaseException:
        cloud.close()
        raise
    return cloud


class Cloud:
    """One connected cloud. Use as a context manager, or call `close()`."""

    def __init__(
        self,
        channel: grpc.Channel,
        identity: Identity,
        run: str,
        *,
        tls: bool,
        on_row: Callable[[dict[str, Any]], None],
        on_retry: Callable[[str], None],
        on_send: Callable[[dict[str, Any]], None],
        on_download: Progress,
        policy: RetryPolicy | None,
    ) -> None:
        self.run = run
        self.card = pb.Card()
        self.prices: PriceList | None = None  # what the cloud asks; None where it names no prices
        self._channel, self._identity, self._tls = channel, identity, tls
        self._stub = BackboneStub(channel)
        self._on_row, self._on_retry, self._policy = on_row, on_retry, policy or RetryPolicy()
        self._on_send = on_send
        downloads = Downloads(
            self._stub, self._policy, tls=tls, metadata=self._metadata(), on_row=on_row, on_retry=on_retry
        )
        self._store = BlobStore(cache_folder(), downloads.fetch, on_download)
        self._steppers = weakref.WeakSet[Stepper]()
        self._numbers = itertools.count()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the streams and the connection."""
        self._closed = True
        for stepper in list(self._steppers):
            stepper.close()
        self._channel.close()

    def load_model(
        self,
        cut: str = "4:4",
        *,
        codec: str | Codecs = "auto",
        dtype: str = "auto",
        device: str = "auto",
        local_path: str | Path | None = None,
    ) -> PreTrainedModel:
        """A transformers model whose trunk runs in this cloud.

        Args:
            cut: "k:m": k blocks at the bottom and m at the top stay here.
            codec: One for all tensors, "activations/gradients", or `Codecs`; "auto" changes no bit.
            dtype: Of the weights here; "auto" takes the cloud's.
            device: auto, cpu, cuda or mps.
            local_path: A whole checkpoint of the same fingerprint, to slice instead of downloading.

        Raises:
            CutError: This cloud does not allow the cut.
            FingerprintError: The weights are not what the cloud announced.
        """
        card, parsed = self.card, Cut.parse(cut)
        policy = card.cut_policy
        CutPolicy(policy.min_bottom, policy.min_top, policy.max_bottom, policy.max_top).check(
            parsed, card.num_blocks
        )
        as_dtype = choose_dtype(card.dtype if dtype == "auto" else dtype, torch.float32)
        stepper = self.open_steps(cut, codec=codec, dtype=as_dtype)
        return build_split_model(
            card,
            parsed,
            stepper,
            self._store,
            dtype=as_dtype,
            device=choose_device(device),
            local_path=None if local_path is None else Path(local_path),
        )

    def add_side(
        self, model: PreTrainedModel | PeftModel, *, taps: int = 8, width: int = 192, heads: int = 4
    ) -> None:
        """Put a fresh side network beside the trunk of a model from `load_model`, after `get_peft_model`.

        From then on what crosses stays frozen, and no gradient crosses: see docs/modes.md, `side`.

        Args:
            model: The split model, as it is or wrapped by PEFT. Adapters of its bottom go around the trunk.
            taps: Inner hidden states that feed the ladder; 0 builds none.
            width: Of the ladder.
            heads: Of its attention.

        Raises:
            UsageError: This cloud offers no projection, or the shape makes no sense.
        """
        add_side(model, self.card, taps=taps, width=width, heads=heads)

    def load_side(self, folder: str | Path, model: PreTrainedModel | PeftModel) -> None:
        """Put the side network that a run saved beside the trunk; raises what `edge.side.load_side` does."""
        load_side(Path(folder), model, self.card)

    def open_steps(
        self,
        cut: str,
        *,
        codec: str | Codecs = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> Stepper:
        """The steps of one more model of this cut, for a trunk that is built already; ends with the cloud.

        Simulated edges take turns in one split model: each swaps in its own steps, so that every activation
        crosses in its own session and on its own account.
        """
        codecs = self._codecs(codec, dtype)
        streams = weakref.WeakSet[GrpcChannel]()

        def open_stream() -> Channel:
            streams.add(stream := self._open_stream(cut))
            return stream

        stepper = Stepper(
            self.run,
            open_stream,
            codecs,
            trunk_dtype=self.card.dtype,
            max_tokens_per_step=self.card.limits.max_tokens_per_step,
            share_prefixes=self.card.shared_prefixes,
            on_row=self._step_row,
            on_retry=self._on_retry,
            on_send=self._on_send,
            policy=self._policy,
            numbers=self._numbers,
        )
        self._steppers.add(stepper)
        weakref.finalize(stepper, _abandon, streams).atexit = False
        return stepper

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's own tokenizer."""
        folder = self._store.files(self.card)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"The cloud's model brings no usable tokenizer: {error}", cure="Load a tokenizer yourself."
            ) from error
        return tokenizer

    def usage(self) -> Iterator[pb.RunUsage]:
        """What this tenant has used, run by run, as the cloud bills it; fetched page by page."""
        return usage_pages(self._stub, self._metadata())

    def _describe(self, wait_s: float) -> None:
        deadline_s = time.monotonic() + wait_s
        while True:
            try:
                self.card = self._stub.Describe(pb.DescribeRequest(), timeout=_GREETING_S)
                break
            except grpc.RpcError as error:
                problem = error_from_rpc(error)
                if not isinstance(problem, CloudUnavailableError) or time.monotonic() > deadline_s:
                    raise problem from error
            time.sleep(0.25)
        if self.card.protocol != PROTOCOL:
            raise ProtocolError(
                f"The cloud speaks {self.card.protocol!r}, this edge {PROTOCOL!r}.",
                cure="Upgrade the older side.",
            )
        verify_bundle(self.card.key_bundle, self._identity.trust)
        require_signed(self.card)
        self.prices = asked_by(self.card)
        check_card(self.card)

    def _open_stream(self, cut: str) -> GrpcChannel:
        """A fresh handshake and its stream; the card is fetched again, for a restarted cloud has new keys."""
        if self._closed:
            raise UsageError(
                "The connection to the cloud of this model was closed.",
                cure="Use the model within `with connect(...)`.",
            )
        fingerprint = self.card.fingerprint
        try:
            card = self._stub.Describe(pb.DescribeRequest(), timeout=PATIENCE_S)
            require_same(self.card, card)
            handshake = ClientHandshake(
                card.key_bundle,
                self._identity,
                self._identity.trust,
                cut=cut,
                fingerprint=fingerprint,
                run=self.run,
            )
            require_signed(card)
            reply = self._stub.Handshake(handshake.request, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        return GrpcChannel(
            self._channel, handshake.finish(reply), tls=self._tls, silence_s=self._policy.longest_silence_s
        )

    def _step_row(self, row: StepRow) -> None:
        self._on_row(row.to_json())

    def _codecs(self, codec: str | Codecs, dtype: torch.dtype) -> Codecs:
        names = _parsed(codec).model_dump()
        names = {tensor: lossless(dtype) if name == "auto" else name for tensor, name in names.items()}
        codecs = Codecs.model_validate(names)
        if missing := set(codecs.model_dump().values()) - set(self.card.codecs):
            raise UsageError(
                f"This cloud does not know the codec {missing.pop()!r}.",
                cure=f"It knows {', '.join(self.card.codecs)}.",
            )
        return codecs

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self._tls else ((TENANT_KEY, self._identity.name),)

    @property
    def cache_secret(self) -> bytes | None:
        """What this edge's activation cache is sealed with; None without an identity of its own."""
        return identity_secret(self._identity) if self._tls else None

    @property
    def config(self) -> dict[str, Any]:
        """The backbone's transformers config."""
        values: dict[str, Any] = json.loads(self.card.config_json)
        return values


def _abandon(streams: "weakref.WeakSet[GrpcChannel]") -> None:
    """Give up what a model that nobody closed has open.

    A mark only: this runs in whichever thread collects garbage, with whatever locks that thread holds.
    """
    for stream in list(streams):
        stream.abandoned = True


def _parsed(codec: str | Codecs) -> Codecs:
    if isinstance(codec, Codecs):
        return codec
    try:
        return Codecs.model_validate(codec)
    except ValidationError as error:
        raise UsageError(f"{codec!r} names no codecs.", cure="Examples: int8, int4/int8s.") from error
