"""What a cloud says that this tenant has used, page by page."""

from collections.abc import Iterator

import grpc

from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.lines import PATIENCE_S
from tightbeam.edge.link.channel import error_from_rpc
from tightbeam.proto import backbone_pb2 as pb
from tightbeam.proto.backbone_pb2_grpc import BackboneStub

__all__ = ["usage_pages"]


def usage_pages(stub: BackboneStub, metadata: tuple[tuple[str, str], ...]) -> Iterator[pb.RunUsage]:
    """Every run, in the order of their names; `ProtocolError` for pages that would never end."""
    reply = pb.UsageReply(more=True)
    while reply.more:
        request = pb.UsageRequest(after=reply.runs[-1].run if reply.runs else "")
        try:
            reply = stub.Usage(request, timeout=PATIENCE_S, metadata=metadata)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        if reply.more and (not reply.runs or reply.runs[-1].run <= request.after):
            raise ProtocolError("The cloud's account of usage goes round in circles.")
        yield from reply.runs
