"""Put the cloud together, serve until SIGTERM or SIGINT, and drain."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from tightbeam.cloud.backbone import load_backbone
from tightbeam.cloud.card import make_card
from tightbeam.cloud.engine import Engine
from tightbeam.cloud.ledger import Ledger
from tightbeam.cloud.projections import ProjectionOptions
from tightbeam.cloud.retention import Retention
from tightbeam.cloud.rpc import reading
from tightbeam.cloud.service import BackboneService
from tightbeam.common.accounts.prices import PriceList
from tightbeam.common.backbone import MAX_TAPS, CutPolicy
from tightbeam.common.devices import free_memory_bytes
from tightbeam.common.errors import IdentityError, TightbeamError, UsageError
from tightbeam.common.identity.identities import Identity, Role, ephemeral_identity, load_identity
from tightbeam.common.wire.handshake import CloudKeys
from tightbeam.common.wire.key_schedule import card_digest
from tightbeam.common.wire.lines import LIVENESS
from tightbeam.common.wire.records import CHUNK_BYTES
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["SERVICE", "ServeOptions", "serve"]

_log = logging.getLogger(__name__)
SERVICE = pb.DESCRIPTOR.services_by_name["Backbone"].full_name
_DRAIN_S = 30.0
_WATCH_S = 2.0

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.max_receive_message_length", CHUNK_BYTES + 65536),
    *LIVENESS,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """What `tightbeam serve` can be told."""

    model: str  # folder or hub id
    listen: str = "127.0.0.1:50051"  # port 0 picks a free one
    identity: Path | None = None  # folder made by `tightbeam certs init`
    insecure: bool = False  # no TLS, no identities; loopback only
    cut_policy: str = ""
    device: str = "auto"
    dtype: str = "auto"
    retention_bytes: int | None = None  # None: a quarter of free memory
    ledger: str = "ledger.db"  # file or SQLAlchemy URL
    max_tokens_per_step: int = 65536
    in_flight_bytes: int | None = None  # of steps on their way; None: a quarter of free host memory
    prices: PriceList | None = None  # what the cloud asks; None: it names no prices
    projection: ProjectionOptions | None = None  # taps are offered through it; None: raw only
    max_taps: int = MAX_TAPS  # in one step; 0 hands out none


async def serve(options: ServeOptions, on_ready: Callable[[int], None] = lambda port: None) -> None:
    """Serve until a signal comes; `on_ready` gets the port once steps are accepted.

    Raises `UsageError` and its kin for what the operator can mend.
    """
    identity = _identity(options)
    listener = _reserve(options.listen)
    ledger = Ledger(options.ledger)
    try:
        backbone = await asyncio.to_thread(
            load_backbone,
            options.model,
            CutPolicy.parse(options.cut_policy),
            device=options.device,
            dtype=options.dtype,
            projection=options.projection,
            max_taps=options.max_taps,
        )
        budget = options.retention_bytes
        budget = free_memory_bytes(backbone.trunk.device()) // 4 if budget is None else budget
        in_flight = options.in_flight_bytes
        quarter = free_memory_bytes(torch.device("cpu")) // 4
        in_flight = quarter if in_flight is None else in_flight
        retention = Retention(budget, backbone.graph_bytes)
        engine = Engine(backbone.trunk, retention, backbone.dtype, backbone.projections)
        service = BackboneService(
            backbone,
            engine,
            ledger,
            CloudKeys.generate(
                identity,
                backbone.fingerprint,
                prices=_announced(options.prices),
                card_digest=card_digest(make_card(backbone, options.max_tokens_per_step)),
            ),
            identity.trust,
            tls=not options.insecure,
            max_tokens_per_step=options.max_tokens_per_step,
            in_flight_bytes=in_flight,
        )
        server = grpc.aio.server(options=_OPTIONS)
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        server.add_generic_rpc_handlers((_handlers(service),))
        reflection.enable_server_reflection(
            (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            server,
        )
        port = _bind(server, listener, options, identity)
        await server.start()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        await health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        watching = asyncio.create_task(_watch(ledger, health))
        on_ready(port)
        await _signalled()
        watching.cancel()
        _log.info("draining: running steps get %.0f s", _DRAIN_S)
        await health.enter_graceful_shutdown()
        await service.drain(_DRAIN_S)
        await server.stop(1.0)
        await asyncio.to_thread(engine.close)
    finally:
        ledger.close()


async def _watch(ledger: Ledger, health: HealthServicer) -> None:
    """Serve only while steps can be billed."""
    told = ""
    while True:
        status, problem = health_pb2.HealthCheckResponse.SERVING, ""
        try:
            await asyncio.to_thread(ledger.check)
        except TightbeamError as error:
            status, problem = health_pb2.HealthCheckResponse.NOT_SERVING, str(error)
        if problem != told:
            _log.error("%s", problem or "the ledger can be written again")
            told = problem
        await health.set("", status)
        await health.set(SERVICE, status)
        await asyncio.sleep(_WATCH_S)


def _handlers(service: BackboneService) -> grpc.GenericRpcHandler:
    """Do as the generated registration does, but requests are read by us, and `Steps` are raw bytes."""
    unary: dict[str, Any] = {
        "Describe": reading(service.describe, pb.DescribeRequest),
        "Handshake": reading(service.handshake, pb.HandshakeRequest),
        "Usage": reading(service.usage, pb.UsageRequest),
    }
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        name: grpc.unary_unary_rpc_method_handler(method, response_serializer=_serialize)
        for name, method in unary.items()
    }
    download: Any = reading(service.download, pb.DownloadRequest)
    handlers["Download"] = grpc.unary_stream_rpc_method_handler(download, response_serializer=_serialize)
    handlers["Steps"] = grpc.stream_stream_rpc_method_handler(service.steps)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _announced(prices: PriceList | None) -> pb.Prices | None:
    if prices is None:
        return None
    _log.info("asks %s", prices.text())
    return pb.Prices(
        currency=prices.currency, per_gigabyte=prices.per_gigabyte, per_petaflop=prices.per_petaflop
    )


def _identity(options: ServeOptions) -> Identity:
    if options.insecure:
        return ephemeral_identity("cloud", Role.CLOUD)
    if options.identity is None:
        raise IdentityError(
            "The cloud needs an identity.",
            cure="Run `tightbeam certs init certs --client NAME`, then pass --identity certs/cloud.",
        )
    identity = load_identity(options.identity)
    if identity.role is not Role.CLOUD:
        raise IdentityError(
            f"{options.identity} is a client's identity.", cure="Pass the folder named cloud."
        )
    return identity


def _reserve(listen: str) -> str:
    """Fail before the model is loaded when the address is malformed or taken."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(
            f"{listen!r} is not an address.", cure="Write HOST:PORT, for example 127.0.0.1:50051."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"Cannot listen on {listen}: {str(error).rstrip('.')}.",
                cure="Choose another --listen address.",
            ) from error
    return listen


def _bind(server: grpc.aio.Server, listen: str, options: ServeOptions, identity: Identity) -> int:
    try:
        if options.insecure:
            return server.add_insecure_port(listen)
        assert identity.tls is not None
        credentials = grpc.ssl_server_credentials(
            [(identity.tls.key, identity.tls.certificate)],
            root_certificates=identity.tls.ca,
            require_client_auth=True,
        )
        return server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise UsageError(
            f"Cannot listen on {listen}: the port is in use.", cure="Choose another --listen."
        ) from error


async def _signalled() -> None:
    loop, signalled = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.set)
    await signalled.wait()
