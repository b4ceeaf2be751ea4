"""The analytic wire size against what a counting proxy saw between a real gRPC server and client."""

import datetime
import ipaddress
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from support.counting_proxy import CountingProxy
from tightbeam.common.accounts.framing import wire_bytes

MIB = 1 << 20
METHOD = "/test.Echo/Echo"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def test_small_message_by_hand() -> None:
    assert wire_bytes([100], tls=False) == 100 + 5 + 9
    assert wire_bytes([100], tls=True) == 100 + 5 + 9 + 22


def test_frames_and_records_split_at_16_kib() -> None:
    exactly_one_frame = 16_384 - 5
    assert wire_bytes([exactly_one_frame], tls=False) == 16_384 + 9
    assert wire_bytes([exactly_one_frame + 1], tls=False) == 16_384 + 1 + 2 * 9
    # The frame header pushes a full frame into a second TLS record.
    assert wire_bytes([exactly_one_frame], tls=True) == 16_384 + 9 + 2 * 22


def test_adds_up_over_messages() -> None:
    sizes = [0, 1, 70_000, MIB + 16]
    for tls in (False, True):
        assert wire_bytes(sizes, tls=tls) == sum(wire_bytes([size], tls=tls) for size in sizes)
    assert wire_bytes([], tls=True) == 0


@given(st.integers(0, 40_000_000), st.booleans())
def test_more_data_is_never_fewer_bytes(size: int, tls: bool) -> None:
    """Each byte costs itself, at most one more frame, and never more than 0.3 % beside a fixed start."""
    wire, next_wire = wire_bytes([size], tls=tls), wire_bytes([size + 1], tls=tls)
    assert 1 <= next_wire - wire <= 1 + 9 + 2 * 22
    assert size < wire <= size * 1.003 + 5 + 9 + 2 * 22


def _self_signed() -> tuple[bytes, bytes]:
    """A certificate for loopback and its key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem), private


def _echo(requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
    """Every message comes back twice: up and down are told apart by their sums."""
    for message in requests:
        yield message
        yield message


@pytest.fixture(params=[False, True], ids=["insecure", "tls"])
def proxied(request: pytest.FixtureRequest) -> Iterator[tuple[bool, CountingProxy, grpc.Channel]]:
    """`(tls, proxy, channel)` to an echo server behind the proxy."""
    tls: bool = request.param
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2), options=UNLIMITED)
    # No serializers: bytes as they are.
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler}),))
    certificate, key = _self_signed()
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    port = (
        server.add_secure_port("127.0.0.1:0", credentials) if tls else server.add_insecure_port("127.0.0.1:0")
    )
    server.start()
    with CountingProxy(port) as proxy:
        target = f"127.0.0.1:{proxy.port}"
        trust = grpc.ssl_channel_credentials(certificate)
        channel = (
            grpc.secure_channel(target, trust, options=UNLIMITED)
            if tls
            else grpc.insecure_channel(target, options=UNLIMITED)
        )
        with channel:
            yield tls, proxy, channel
    server.stop(None).wait()


@pytest.mark.parametrize(
    "sizes",
    [[100_000], [300, 2 * 64 * 576 * 4], [400, MIB + 16, MIB + 16, 123_456], [16_384] * 20],
    ids=["100 kB", "one small step", "several chunks", "many records"],
)
def test_within_one_percent_of_the_proxy(
    proxied: tuple[bool, CountingProxy, grpc.Channel], sizes: list[int]
) -> None:
    tls, proxy, channel = proxied
    grpc.channel_ready_future(channel).result(timeout=10)
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
    list(call(iter([b"warm"])))  # connection, settings and header tables are per connection, not per step
    up_before, down_before = proxy.snapshot()

    replies = list(call(iter([bytes(size) for size in sizes])))

    up, down = (now - before for now, before in zip(proxy.snapshot(), (up_before, down_before), strict=True))
    assert [len(reply) for reply in replies] == [size for size in sizes for _ in "ab"]
    ratios = up / wire_bytes(sizes, tls=tls), down / wire_bytes([s for s in sizes for _ in "ab"], tls=tls)
    print(f"tls={tls} steps of {sum(sizes)} B: proxy/analytic up {ratios[0]:.4f}, down {ratios[1]:.4f}")
    assert all(abs(ratio - 1) < 0.01 for ratio in ratios), ratios


def test_the_proxy_would_notice_a_missing_transfer(
    proxied: tuple[bool, CountingProxy, grpc.Channel],
) -> None:
    tls, proxy, channel = proxied
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
    before, _ = proxy.snapshot()
    list(call(iter([bytes(200_000), bytes(200_000)])))
    after, _ = proxy.snapshot()
    assert (after - before) / wire_bytes([200_000], tls=tls) > 1.9
