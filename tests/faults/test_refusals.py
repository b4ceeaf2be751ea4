"""What a cloud refuses when the edge's own check was left out, who is told what, and that nobody retries."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from support import reference_wire as wire
from support.commands import Cloud
from support.mitm import Mitm
from support.split_runs import SplitRun, batch, split_run
from tightbeam.common.errors import (
    CutError,
    FingerprintError,
    IdentityError,
    NonFiniteError,
    StaleHandshakeError,
    StepConflictError,
    StepTooLargeError,
    TightbeamError,
)
from tightbeam.common.identity.identities import (
    Identity,
    ephemeral_identity,
    init_certificates,
    load_identity,
)
from tightbeam.common.wire.handshake import ClientHandshake
from tightbeam.common.wire.key_schedule import suite_name
from tightbeam.common.wire.records import Aead
from tightbeam.common.wire.stepping import SESSION_KEY
from tightbeam.edge.link import stepper
from tightbeam.edge.link.channel import STEPS_METHOD, error_from_rpc
from tightbeam.proto import backbone_pb2 as pb
from tightbeam.proto.backbone_pb2_grpc import BackboneStub


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    limit = ("--max-tokens-per-step", "40")
    with Cloud(model, tmp_path_factory.mktemp("cloud"), *limit) as process:
        yield process


@pytest.fixture
def mitm(cloud: Cloud) -> Iterator[Mitm]:
    with Mitm(cloud.address) as proxy:
        yield proxy


def assert_tried_once(mitm: Mitm, run: SplitRun) -> None:
    assert run.retries == []
    assert mitm.calls["Handshake"] == 1


def test_an_oversized_step(mitm: Mitm, monkeypatch: pytest.MonkeyPatch) -> None:
    with split_run(mitm.address) as run:
        with pytest.raises(
            StepTooLargeError, match=r"batch of 45 tokens is over the cloud's limit of 40.*Lower"
        ):
            run.model(**batch(0, rows=6))
        assert mitm.calls["Steps"] == 0  # the edge itself
        (mine,) = run.cloud._steppers
        monkeypatch.setattr(mine, "max_tokens_per_step", 10**9)
        with pytest.raises(
            StepTooLargeError, match=r"step of 45 tokens is over this cloud's limit of 40.*smaller"
        ):
            run.model(**batch(0, rows=6))
        assert_tried_once(mitm, run)
        assert run.gradients()  # the run itself is unharmed
        run.assert_accounts_agree()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf(mitm: Mitm, monkeypatch: pytest.MonkeyPatch, poison: float) -> None:
    with split_run(mitm.address) as run:
        embedding = run.model.get_input_embeddings().weight
        token = int(batch(0)["input_ids"][0, 0])
        clean = embedding[token].detach().clone()
        with torch.no_grad():
            embedding[token] = poison
        with pytest.raises(
            NonFiniteError, match=r"at the cut hold NaN or Inf; nothing was sent.*Lower train\.lr"
        ):
            run.gradients()
        assert mitm.calls["Steps"] == 0

        def unseen(tensor_ND: Tensor, what: str) -> Tensor:
            return tensor_ND

        monkeypatch.setattr(stepper, "finite", unseen)
        with pytest.raises(NonFiniteError, match=r"activations of this step hold NaN or Inf\. Lower"):
            run.gradients()
        assert_tried_once(mitm, run)
        with torch.no_grad():
            embedding[token] = clean
        assert run.gradients()
        run.assert_accounts_agree()  # the refused step is in neither account


def test_one_step_key_with_two_contents(mitm: Mitm) -> None:
    with split_run(mitm.address) as run:
        run.gradients()
        (mine,) = run.cloud._steppers
        mine._numbers = iter([0])
        with pytest.raises(StepConflictError, match=r"sent step 0 \(forward\) before with another content"):
            run.gradients(seed=1)
        assert_tried_once(mitm, run)
        assert run.usage().forward_steps == 1


def test_a_disallowed_cut(mitm: Mitm) -> None:
    with split_run(mitm.address) as run:
        with pytest.raises(CutError, match="Choose"):
            run.cloud.load_model("0:1")
        with pytest.raises(CutError, match="Choose"):  # the cloud's own answer
            run.cloud._open_stream("0:1")
    assert mitm.calls["Handshake"] == 1


class Caller:
    """Builds handshakes that the edge's own code would not send."""

    def __init__(self, channel: grpc.Channel, identity: Identity) -> None:
        self._channel, self._stub, self._identity = channel, BackboneStub(channel), identity
        self.card = self._stub.Describe(pb.DescribeRequest(), timeout=10)

    def ask(self, *, cut: str = "1:1", fingerprint: str = "", spoil: bool = False) -> pb.HandshakeReply:
        bundle, pair = self.card.key_bundle, wire.KemPair()
        request = pb.HandshakeRequest(
            suite=suite_name(Aead.AES_256_GCM), key_id=bundle.key_id, kem_public_key=pair.public,
            identity_certificate=self._identity.certificate_der, cut=cut, run="r",
            fingerprint=fingerprint or bundle.fingerprint,
        )  # fmt: skip
        wire.fill_request(bundle, request, self._identity.signing_key, bytes(32))
        if spoil:
            request.signature = bytes(64)
        try:
            return self._stub.Handshake(request, timeout=10)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def stream(self, session_id: str) -> TightbeamError:
        method: Any = self._channel.stream_stream(STEPS_METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            list(method(iter([b"record"]), metadata=((SESSION_KEY, session_id),)))
        return error_from_rpc(caught.value)


@pytest.fixture
def caller(cloud: Cloud) -> Iterator[Caller]:
    with grpc.insecure_channel(cloud.address) as channel:
        yield Caller(channel, ephemeral_identity("caller"))


def test_who_does_not_prove_an_identity_learns_only_that(caller: Caller) -> None:
    assert caller.ask()
    wrong: list[dict[str, Any]] = [{"cut": "0:9"}, {"cut": "nonsense"}, {"fingerprint": "cd" * 32}]
    for given in wrong:
        with pytest.raises((CutError, FingerprintError)):
            caller.ask(**given)
        with pytest.raises(IdentityError, match="signature does not fit"):
            caller.ask(**given, spoil=True)


def test_another_backbone(caller: Caller) -> None:
    with pytest.raises(FingerprintError, match=r"expects the backbone cdcdcdcdcdcd, this cloud serves"):
        caller.ask(fingerprint="cd" * 32)


@pytest.mark.parametrize("name", ["", "zz", "00" * 16])
def test_a_stream_without_a_session_is_told_to_shake_hands_again(caller: Caller, name: str) -> None:
    error = caller.stream(name)
    assert isinstance(error, StaleHandshakeError)
    assert error.transient  # a cloud restarted between handshake and stream; an edge connects anew


def test_a_session_serves_one_stream(caller: Caller) -> None:
    session_id = caller.ask().session_id.hex()
    assert caller.stream(session_id).code == "integrity"
    assert caller.stream(session_id).code == "stale_handshake"


def test_a_card_that_is_not_the_signed_one_is_refused(mitm: Mitm, cloud: Cloud) -> None:
    """Who ends TLS may exchange config, weights and fingerprint together; the identity did not sign that."""

    def exchanged(method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for reply in forward(method, requests, context):
            card = pb.Card.FromString(reply)
            card.fingerprint = "cd" * 32
            yield card.SerializeToString() if method.endswith("/Describe") else reply

    forward = mitm._forward
    mitm._forward = exchanged  # type: ignore[method-assign]  # someone who ends TLS
    with (
        pytest.raises(FingerprintError, match="not the one that the cloud's identity vouches for"),
        split_run(mitm.address),
    ):
        pass


def test_tls_and_handshake_must_name_one_tenant(model: Path, tmp_path: Path) -> None:
    init_certificates(tmp_path / "certs", clients=["clinic", "lab"])
    clinic, lab = (load_identity(tmp_path / "certs" / name) for name in ("clinic", "lab"))
    assert clinic.tls is not None
    credentials = grpc.ssl_channel_credentials(clinic.tls.ca, clinic.tls.key, clinic.tls.certificate)
    with (
        Cloud(model, tmp_path / "cloud", "--identity", str(tmp_path / "certs" / "cloud")) as cloud,
        grpc.secure_channel(f"localhost:{cloud.port}", credentials) as channel,
    ):
        card = BackboneStub(channel).Describe(pb.DescribeRequest(), timeout=10)
        with pytest.raises(IdentityError, match=r"TLS names the tenant 'clinic', the handshake 'lab'"):
            Caller(channel, lab).ask()
        shake = ClientHandshake(
            card.key_bundle, clinic, clinic.trust, cut="1:1", fingerprint=card.fingerprint, run="r"
        )
        assert shake.finish(BackboneStub(channel).Handshake(shake.request, timeout=10)).peer == "cloud"
        reply = BackboneStub(channel).Usage(pb.UsageRequest(), timeout=10)
        assert list(reply.runs) == []
        # what ends TLS on the way has a certificate of its own: of the same authority, and no tenant's
        ours = load_identity(tmp_path / "certs" / "cloud").tls
        assert ours is not None
        ended = grpc.ssl_channel_credentials(ours.ca, ours.key, ours.certificate)
        with grpc.secure_channel(f"localhost:{cloud.port}", ended) as proxy:
            with pytest.raises(IdentityError, match=r"names no tenant\..*a proxy .* must pass TLS through"):
                Caller(proxy, clinic).ask()
            with pytest.raises(grpc.RpcError) as caught:
                BackboneStub(proxy).Usage(pb.UsageRequest(), timeout=10)
            assert isinstance(error_from_rpc(caught.value), IdentityError)
