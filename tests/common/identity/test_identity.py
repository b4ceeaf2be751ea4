"""Identities: what `init_certificates` makes works in real TLS, and everything wrong with one is said."""

import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from tightbeam.common.errors import IdentityError
from tightbeam.common.identity.certificates import holder_uri
from tightbeam.common.identity.identities import (
    CLOUD_NAMES,
    Identity,
    Role,
    Trust,
    ephemeral_identity,
    init_certificates,
    load_identity,
)

FILES = ["ca.crt", "identity.crt", "identity.key", "tls.crt", "tls.key"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    init_certificates(folder, clients=["clinic", "lab"])
    return folder


@pytest.fixture
def certs(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "certs")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_init_makes_one_whole_folder_for_each(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == ["ca", "clinic", "cloud", "lab"]
    for holder in ("cloud", "clinic", "lab"):
        assert sorted(path.name for path in (made / holder).iterdir()) == FILES
    for name, role in (("cloud", Role.CLOUD), ("clinic", Role.TENANT)):
        identity = load_identity(made / name)
        assert (identity.name, identity.role) == (name, role)
        assert identity.trust.verify(identity.certificate_der, role).name == name


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has access lists instead of modes")
def test_private_keys_are_for_their_owner_only(made: Path) -> None:
    keys = list(made.rglob("*.key"))
    assert len(keys) == 7
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE((made / "clinic" / "ca.crt").stat().st_mode) & 0o444 == 0o444


def test_running_it_again_adds_only_the_new(certs: Path) -> None:
    before = contents(certs)
    report = init_certificates(certs, clients=["clinic", "surgery", "surgery"])
    after = contents(certs)
    assert report.created == (certs / "surgery",)
    assert report.kept == (certs / "ca", certs / "cloud", certs / "clinic")
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} == {f"surgery/{name}" for name in FILES}
    peer = load_identity(certs / "cloud").trust.verify(
        load_identity(certs / "surgery").certificate_der, Role.TENANT
    )
    assert peer.name == "surgery"


def test_a_host_that_a_cloud_lacks_is_not_dropped_in_silence(tmp_path: Path) -> None:
    hosts = [*CLOUD_NAMES, "cloud.example", "10.0.0.7"]
    init_certificates(tmp_path, clients=["clinic"], cloud_names=hosts)
    init_certificates(tmp_path, clients=["lab"], cloud_names=hosts)
    init_certificates(tmp_path, clients=["ward"])  # who adds a client does not have to know the hosts
    with pytest.raises(IdentityError, match=r"cloud is there.*host other\.example, 10\.0\.0\.8\. Del"):
        init_certificates(tmp_path, clients=["late"], cloud_names=[*hosts, "other.example", "10.0.0.8"])
    assert not (tmp_path / "late").exists()


def test_a_full_disk_leaves_no_half_a_folder(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = contents(certs), []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        init_certificates(certs, clients=["surgery"])
    assert contents(certs) == before
    assert sorted(path.name for path in certs.iterdir()) == ["ca", "clinic", "cloud", "lab"]
    init_certificates(certs, clients=["surgery"])
    assert load_identity(certs / "surgery").name == "surgery"


@pytest.mark.parametrize("name", ["", "ca", "cloud", "Clinic", "a/b", "..", "-a", "a-", "a b", "a" * 64, "å"])
def test_a_name_that_is_no_folder_or_uri_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(IdentityError, match="cannot be the name of a client"):
        init_certificates(tmp_path / "certs", clients=["fine", name])
    assert not (tmp_path / "certs").exists()


def test_certificates_last_as_long_as_asked_but_not_longer_than_their_authority(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    for days, expected in ((2, 2), (90_000, 3650)):
        init_certificates(tmp_path / str(days), clients=[], days=days)
        certificate = x509.load_der_x509_certificate(
            load_identity(tmp_path / str(days) / "cloud").certificate_der
        )
        assert abs(certificate.not_valid_after_utc - now - timedelta(days=expected)) < timedelta(minutes=1)


def test_an_authority_without_its_key_says_so(certs: Path) -> None:
    (certs / "ca" / "ca.key").rename(certs / "moved-offline")
    with pytest.raises(IdentityError, match=r"incomplete.*Put ca.crt and ca.key back"):
        init_certificates(certs, clients=["surgery"])
    shutil.copy(certs / "clinic" / "tls.key", certs / "ca" / "ca.key")
    with pytest.raises(IdentityError, match=r"ca.key does not belong to ca.crt"):
        init_certificates(certs, clients=["surgery"])


def test_a_cloud_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="no host name"):
        init_certificates(tmp_path, clients=[], cloud_names=["bücher.example"])


def test_a_missing_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="tightbeam certs init") as caught:
        load_identity(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_garbled_file_is_named(certs: Path, file: str) -> None:
    path = certs / "clinic" / file
    path.write_text("garbled")
    with pytest.raises(IdentityError) as caught:
        load_identity(certs / "clinic")
    assert file in str(caught.value)
    assert caught.value.cure
    path.unlink()
    with pytest.raises(IdentityError, match=f"Cannot read .*{file}"):
        load_identity(certs / "clinic")


@pytest.mark.parametrize("stem", ["identity", "tls"])
def test_a_key_that_is_another_certificates_is_refused(certs: Path, stem: str) -> None:
    shutil.copy(certs / "lab" / f"{stem}.key", certs / "clinic" / f"{stem}.key")
    with pytest.raises(IdentityError, match=r"does not belong to .*Restore both"):
        load_identity(certs / "clinic")


@pytest.mark.parametrize("stem", ["identity", "tls"])
def test_holders_of_one_folder_must_be_one(certs: Path, stem: str) -> None:
    for end in ("crt", "key"):
        shutil.copy(certs / "lab" / f"{stem}.{end}", certs / "clinic" / f"{stem}.{end}")
    with pytest.raises(IdentityError, match="different holders"):
        load_identity(certs / "clinic")


def test_kinds_of_keys_cannot_be_swapped(certs: Path) -> None:
    folder = certs / "clinic"
    for end in ("crt", "key"):
        (folder / f"tls.{end}").rename(folder / "kept")
        (folder / f"identity.{end}").rename(folder / f"tls.{end}")
        (folder / "kept").rename(folder / f"identity.{end}")
    with pytest.raises(IdentityError, match="wrong kind"):
        load_identity(folder)


def test_a_folder_of_another_authority_is_refused(certs: Path, tmp_path: Path) -> None:
    init_certificates(tmp_path / "other", clients=[])
    shutil.copy(tmp_path / "other" / "ca" / "ca.crt", certs / "clinic" / "ca.crt")
    with pytest.raises(IdentityError, match=r"Not issued by .*identity.crt"):
        load_identity(certs / "clinic")


def test_dates_are_checked_with_the_cure(certs: Path) -> None:
    now = datetime.now(UTC)
    with pytest.raises(IdentityError, match=r"Expired on .*certs init"):
        load_identity(certs / "clinic", now + timedelta(days=366))
    with pytest.raises(IdentityError, match=r"Not valid before .*clock"):
        load_identity(certs / "clinic", now - timedelta(hours=1))
    load_identity(certs / "clinic", now - timedelta(minutes=9))


def test_an_encrypted_key_is_refused_with_the_reason(certs: Path) -> None:
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption

    identity = load_identity(certs / "clinic")
    locked = identity.signing_key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
    )
    (certs / "clinic" / "identity.key").write_bytes(locked)
    with pytest.raises(IdentityError, match="not an unencrypted PEM private key"):
        load_identity(certs / "clinic")


def test_keys_are_not_printed(made: Path) -> None:
    identity = load_identity(made / "clinic")
    assert identity.tls is not None
    raw = identity.signing_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    for shown in (repr(identity), repr(identity.tls)):
        assert "PRIVATE KEY" not in shown
        assert raw.hex() not in shown
    assert repr(identity) == "Identity(name='clinic', role=<Role.TENANT: 'tenant'>)"


def test_trust_tells_roles_and_kinds_of_certificates_apart(made: Path) -> None:
    cloud, clinic = load_identity(made / "cloud"), load_identity(made / "clinic")
    assert cloud.authority is not None
    assert clinic.tls is not None
    trust = Trust.ca(cloud.authority)
    assert trust.verify(clinic.certificate_der, Role.TENANT).name == "clinic"
    for certificate, role in ((clinic.certificate_der, Role.CLOUD), (cloud.certificate_der, Role.TENANT)):
        with pytest.raises(IdentityError, match="Does not name a"):
            trust.verify(certificate, role)
    tls = x509.load_pem_x509_certificate(clinic.tls.certificate).public_bytes(Encoding.DER)
    with pytest.raises(IdentityError, match=r"identity\.crt"):
        trust.verify(tls, Role.TENANT)
    with pytest.raises(IdentityError, match="Does not name a tenant"):
        trust.verify(cloud.authority.public_bytes(Encoding.DER), Role.TENANT)


def test_ephemeral_identities_are_trusted_by_anyone_only(made: Path) -> None:
    me, cloud = ephemeral_identity("me"), ephemeral_identity("cloud", Role.CLOUD)
    assert me.tls is None
    assert Trust.anyone().verify(me.certificate_der, Role.TENANT).name == "insecure/me"
    assert Trust.anyone().verify(cloud.certificate_der, Role.CLOUD).name == "insecure/cloud"
    with pytest.raises(IdentityError, match="--insecure on both or neither"):
        load_identity(made / "cloud").trust.verify(me.certificate_der, Role.TENANT)
    with pytest.raises(IdentityError, match="Expired"):
        Trust.anyone().verify(me.certificate_der, Role.TENANT, datetime.now(UTC) + timedelta(days=400))
    with pytest.raises(IdentityError, match="cannot be the name"):
        ephemeral_identity("../me")


@given(bit=st.integers(0, 8 * 700), length=st.one_of(st.none(), st.integers(0, 700)))
def test_no_certificate_raises_anything_but_an_identity_error(
    made: Path, bit: int, length: int | None
) -> None:
    identity = load_identity(made / "clinic")
    certificate = bytearray(identity.certificate_der)
    certificate[bit // 8 % len(certificate)] ^= 1 << bit % 8
    altered = bytes(certificate[:length])
    with pytest.raises(IdentityError):
        identity.trust.verify(altered, Role.TENANT)
    with suppress(IdentityError):
        assert Trust.anyone().verify(altered, Role.TENANT).name.startswith("insecure/")


@contextmanager
def echo_server(identity: Identity) -> Iterator[int]:
    """A server that demands client certificates and answers with the caller's SANs; yields its port."""
    assert identity.tls is not None

    def names(request: bytes, context: grpc.ServicerContext) -> bytes:
        # The stubs say bytes; gRPC gives a list of them.
        return b"|".join(cast(list[bytes], context.auth_context()["x509_subject_alternative_name"]))

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(names)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", {"Names": handler})])
    credentials = grpc.ssl_server_credentials(
        [(identity.tls.key, identity.tls.certificate)], identity.tls.ca, require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def call(address: str, identity: Identity) -> bytes:
    assert identity.tls is not None
    credentials = grpc.ssl_channel_credentials(identity.tls.ca, identity.tls.key, identity.tls.certificate)
    with grpc.secure_channel(address, credentials) as channel:
        names: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Echo/Names")
        return names(b"", timeout=5)


def test_grpc_accepts_them_both_ways_and_no_others(made: Path, tmp_path: Path) -> None:
    init_certificates(tmp_path, clients=["clinic"])
    with echo_server(load_identity(made / "cloud")) as port:
        for host in ("127.0.0.1", "localhost"):
            names = call(f"{host}:{port}", load_identity(made / "clinic"))
            assert names == holder_uri("clinic", Role.TENANT).encode()
        with pytest.raises(grpc.RpcError):
            call(f"127.0.0.1:{port}", load_identity(tmp_path / "clinic"))
