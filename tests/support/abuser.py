"""A client that speaks the protocol well and behaves badly, with an identity as every tenant has one."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import torch

from tightbeam.common.identity.identities import ephemeral_identity
from tightbeam.common.wire.handshake import ClientHandshake, Session
from tightbeam.common.wire.messages import encode_tensor, seal_message
from tightbeam.common.wire.stepping import SESSION_KEY, TENANT_KEY
from tightbeam.edge.link.channel import STEPS_METHOD, error_from_rpc
from tightbeam.proto import backbone_pb2 as pb
from tightbeam.proto.backbone_pb2_grpc import BackboneStub

__all__ = ["Abuser", "own_channel"]

_SEGMENT = 200  # tokens


def own_channel(address: str) -> grpc.Channel:
    """A channel that shares its connection with no other of this process."""
    return grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


class Abuser:
    """One misbehaving tenant."""

    def __init__(self, channel: grpc.Channel, name: str = "abuser") -> None:
        self._channel, self.stub, self._name = channel, BackboneStub(channel), name
        self.card = self.stub.Describe(pb.DescribeRequest(), timeout=10)
        self.metadata = ((TENANT_KEY, name),)

    def handshake(self, run: str = "r") -> Session:
        """A session that waits for its stream."""
        identity = ephemeral_identity(self._name)
        shake = ClientHandshake(
            self.stub.Describe(pb.DescribeRequest(), timeout=10).key_bundle,
            identity, identity.trust, cut="1:1", fingerprint=self.card.fingerprint, run=run,
        )  # fmt: skip
        try:
            return shake.finish(self.stub.Handshake(shake.request, timeout=10))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def stream(self, session: Session, records: Iterable[bytes]) -> Any:
        """A stream that sends the records, says no more, and does not hang up."""
        silent = threading.Event()

        def requests() -> Iterator[bytes]:
            yield from records
            silent.wait(600)

        method: Any = self._channel.stream_stream(STEPS_METHOD)
        call: Any = method(requests(), metadata=((SESSION_KEY, session.session_id.hex()),))
        call.add_callback(silent.set)
        return call

    def forward(self, num_tokens: int, step: int = 0, *, keep: bool = False) -> pb.StepRequest:
        """The header of a forward in float32."""
        lengths = [_SEGMENT] * (num_tokens // _SEGMENT) + [num_tokens % _SEGMENT] * bool(
            num_tokens % _SEGMENT
        )
        request = pb.StepRequest(
            step=step, kind=pb.FORWARD, keep=keep, reply_codec="fp32", lengths=lengths,
            run_starts=[0] * len(lengths), run_lengths=lengths,
        )  # fmt: skip
        request.tensors.add(
            name="hidden", codec="fp32", shape=[num_tokens, self.card.hidden_size], dtype="float32"
        )
        return request

    def header(self, session: Session, num_tokens: int) -> bytes:
        """The sealed header of a forward, without its tensor."""
        return next(seal_message(self.forward(num_tokens).SerializeToString(), [], session.sealer))

    def records(self, session: Session, request: pb.StepRequest) -> Iterator[bytes]:
        """All records of a forward of ones."""
        ones_ND = torch.ones(list(request.tensors[0].shape))
        _, payload = encode_tensor("hidden", ones_ND, "fp32")
        return seal_message(request.SerializeToString(), [payload], session.sealer)

    def half_a_step(self, num_tokens: int, *, pause_s: float = 0.0) -> Any:
        """A stream with all records of a forward but the last, one every `pause_s`."""
        session = self.handshake()
        records = list(self.records(session, self.forward(num_tokens)))[:-1]

        def slowly() -> Iterator[bytes]:
            for record in records:
                yield record
                time.sleep(pause_s)

        return self.stream(session, slowly())
