"""`tightbeam doctor`: from this machine to a cloud that answers, one step at a time.

Each step is a `Finding`; a failed one says what to do. The way to the cloud stops at the first failure: what
comes after it could only fail for the same reason. From the card on it is what `tightbeam train` does, by the
same code, up to a step that the cloud cannot know; nothing is sent that a tenant pays for.
"""

import importlib.metadata
import platform
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tightbeam.common.addresses import split_address
from tightbeam.common.errors import IdentityError, TightbeamError, UsageError
from tightbeam.common.identity.certificates import parse_certificate
from tightbeam.common.identity.identities import Identity, load_identity
from tightbeam.common.wire.records import PROTOCOL
from tightbeam.edge.link.carrier import RetryPolicy
from tightbeam.edge.link.connection import connect
from tightbeam.proto import backbone_pb2

__all__ = ["Finding", "examine"]

SERVICE = "tightbeam.v1.Backbone"
_NUM_PINGS = 5
_SOON_DAYS = 14


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw; `cure` is empty when it is well."""

    name: str
    ok: bool
    detail: str
    cure: str = ""


def examine(
    address: str,
    *,
    identity: Path | None = None,
    insecure: bool = False,
    timeout_s: float = 5.0,
) -> list[Finding]:
    """Check this machine and then the way to `address` (host:port); each network step has `timeout_s`."""
    findings = list(_this_machine())
    own: Identity | None = None
    if not insecure:
        finding, own = _identity(identity)
        findings.append(finding)
        if own is None:
            return findings
    for finding in _way_to_cloud(address, identity, own, timeout_s):
        findings.append(finding)
        if not finding.ok:
            break
    return findings


def _this_machine() -> Iterator[Finding]:
    names = ("tightbeam", "torch", "transformers", "peft", "grpcio", "cryptography")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    yield Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("packages", True, versions)
    yield Finding("device", True, _device())


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu, {torch.get_num_threads()} threads"


def _identity(folder: Path | None) -> tuple[Finding, Identity | None]:
    if folder is None:
        cure = "Give --identity DIR, or --insecure on loopback."
        return Finding("identity", False, "none given", cure), None
    try:
        own = load_identity(folder)
    except IdentityError as error:
        return Finding("identity", False, error.message, error.cure), None
    days = _days_left(parse_certificate(own.certificate_der).not_valid_after_utc)
    detail = f"{own.name} ({own.role}), valid for {days} more days"
    return Finding("identity", True, detail + (", renew it soon" if days < _SOON_DAYS else "")), own


def _days_left(until: datetime) -> int:
    return (until - datetime.now(UTC)).days


def _way_to_cloud(
    address: str, folder: Path | None, own: Identity | None, timeout_s: float
) -> Iterator[Finding]:
    try:
        host, port = split_address(address)
    except UsageError as error:
        yield Finding("address", False, error.message, error.cure)
        return
    yield _resolve(host, port)
    yield _connect(host, port, timeout_s)
    if folder is not None and own is not None:
        yield _tls(host, port, folder, timeout_s)
    with _channel(address, own) as channel:
        yield _health(channel, timeout_s)
        yield from _as_train(address, folder, own is None, timeout_s, channel)


def _resolve(host: str, port: int) -> Finding:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Finding(
            "dns", False, f"{host}: {error.strerror}", "Check the name and this machine's network."
        )
    return Finding("dns", True, f"{host} is {', '.join(dict.fromkeys(str(entry[4][0]) for entry in found))}")


def _connect(host: str, port: int, timeout_s: float) -> Finding:
    started = time.perf_counter()
    try:
        socket.create_connection((host, port), timeout_s).close()
    except ConnectionRefusedError:
        cure = "Start the cloud (`tightbeam serve`) or check the port; a cloud on 127.0.0.1 is local only."
        return Finding("tcp", False, f"nothing listens on {host}:{port}", cure)
    except OSError as error:
        cure = f"Let a firewall on either side pass TCP port {port}."
        return Finding("tcp", False, f"no connection to {host}:{port} ({error})", cure)
    return Finding("tcp", True, f"connected in {_ms(time.perf_counter() - started)}")


def _tls(host: str, port: int, folder: Path, timeout_s: float) -> Finding:
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            secured.recv(1)  # in TLS 1.3 a refused client certificate shows at the first read
            protocol, chosen = secured.version(), secured.selected_alpn_protocol()
            certificate = parse_certificate(secured.getpeercert(binary_form=True) or b"")
    except ssl.SSLCertVerificationError as error:
        return Finding(
            "tls", False, f"the cloud's certificate is refused: {error.verify_message}", _cure(host)
        )
    except (OSError, IdentityError) as error:
        cure = "Start the cloud with --identity, with an identity of the same authority as this side's."
        return Finding("tls", False, f"no TLS session ({error})", cure)
    if chosen != "h2":
        cure = "Something between here and the cloud speaks no HTTP/2; use another way or port."
        return Finding("tls", False, f"{protocol}, but HTTP/2 was not agreed (ALPN: {chosen})", cure)
    days = _days_left(certificate.not_valid_after_utc)
    return Finding("tls", True, f"{protocol}, h2; the cloud's certificate is valid for {days} more days")


def _cure(host: str) -> str:
    return (
        f"Use identities of one `tightbeam certs init`. If {host} is not in the cloud's certificate: delete "
        f"the folder `cloud`, run it again with --host {host}, restart the cloud. Check this machine's clock."
    )


def _channel(address: str, own: Identity | None) -> grpc.Channel:
    if own is None or own.tls is None:
        return grpc.insecure_channel(address)
    credentials = grpc.ssl_channel_credentials(own.tls.ca, own.tls.key, own.tls.certificate)
    return grpc.secure_channel(address, credentials)


def _health(channel: grpc.Channel, timeout_s: float) -> Finding:
    try:
        answer = _ask_health(channel, timeout_s)
    except grpc.RpcError as error:
        cure = (
            "Is this a tightbeam cloud? A cloud without TLS needs --insecure here, one with TLS --identity."
        )
        return Finding("health", False, _status(error), cure)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return Finding("health", False, name, "The cloud is starting or draining: try again in a minute.")
    return Finding("health", True, "SERVING")


def _ask_health(channel: grpc.Channel, timeout_s: float) -> health_pb2.HealthCheckResponse:
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)


def _as_train(
    address: str, folder: Path | None, insecure: bool, timeout_s: float, channel: grpc.Channel
) -> Iterator[Finding]:
    """What `tightbeam train` does until its first step, by the same code."""
    policy = RetryPolicy(give_up_after_s=0.0)
    what = "card"
    try:
        with connect(
            address, identity=folder, insecure=insecure, wait_s=timeout_s, policy=policy, on_retry=_no_word
        ) as cloud:
            card = cloud.card
            here = importlib.metadata.version("tightbeam")
            detail = f"{PROTOCOL}; the cloud is tightbeam {card.version}, this is {here}"
            yield Finding("protocol", True, detail)
            yield Finding("model", True, _describe(card))
            until = datetime.fromtimestamp(card.key_bundle.not_after, UTC)
            yield Finding("clock", True, f"the cloud's sealing key is good until {until:%Y-%m-%d %H:%M} UTC")
            yield _round_trip(channel, timeout_s)
            what = "step"
            cut = f"{card.cut_policy.min_bottom}:{card.cut_policy.min_top}"
            cloud.open_steps(cut).probe(card.hidden_size)
            yield Finding("step", True, "a handshake, a stream, and an answer on it; nothing was billed")
    except TightbeamError as error:
        yield Finding(what, False, error.message, error.cure)


def _no_word(line: str) -> None:
    """Nothing is retried here."""


def _describe(card: backbone_pb2.Card) -> str:
    policy = card.cut_policy
    return (
        f"{card.model} ({card.dtype}, {card.num_blocks} blocks of width {card.hidden_size}), "
        f"fingerprint {card.fingerprint}; bottom {policy.min_bottom} to {policy.max_bottom} blocks, "
        f"top {policy.min_top} to {policy.max_top}; codecs {' '.join(card.codecs)}; "
        f"at most {card.limits.max_tokens_per_step} tokens per step; {_asked(card)}"
    )


def _asked(card: backbone_pb2.Card) -> str:
    """The list as the card says it; `connect` checks whether the cloud has signed it."""
    if not card.HasField("prices"):
        return "no prices"
    prices = card.prices
    return (
        f"asks {prices.per_gigabyte:g} per GB and {prices.per_petaflop:g} per PFLOP, in {prices.currency!r}"
    )


def _round_trip(channel: grpc.Channel, timeout_s: float) -> Finding:
    seconds = []
    try:
        for _ in range(_NUM_PINGS):
            started = time.perf_counter()
            _ask_health(channel, timeout_s)
            seconds.append(time.perf_counter() - started)
    except grpc.RpcError as error:
        return Finding("round trip", False, _status(error), "The connection is unsteady: try again.")
    detail = f"best {_ms(min(seconds))}, worst {_ms(max(seconds))} of {_NUM_PINGS}; a step takes two"
    return Finding("round trip", True, detail)


def _status(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
