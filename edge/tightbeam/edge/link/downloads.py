"""Blobs from the cloud: fetched again from where the line broke, each attempt on the account."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from tightbeam.common.accounts.framing import wire_bytes
from tightbeam.common.errors import TightbeamError
from tightbeam.edge.link.carrier import Retries, RetryPolicy
from tightbeam.edge.link.channel import error_from_rpc
from tightbeam.proto import backbone_pb2 as pb
from tightbeam.proto.backbone_pb2_grpc import BackboneStub

__all__ = ["Downloads"]


class Downloads:
    """The weights of one connected cloud."""

    def __init__(
        self,
        stub: BackboneStub,
        policy: RetryPolicy,
        *,
        tls: bool,
        metadata: tuple[tuple[str, str], ...],
        on_row: Callable[[dict[str, Any]], None],
        on_retry: Callable[[str], None],
    ) -> None:
        self._stub, self._policy, self._tls, self._metadata = stub, policy, tls, metadata
        self._on_row, self._on_retry = on_row, on_retry

    def fetch(self, blob: pb.Blob, offset: int) -> Iterator[bytes]:
        """The bytes of a blob from an offset on; raises what the cloud refuses, or the last failure."""
        retries = Retries(self._policy, self._on_retry)
        while True:
            try:
                for piece in self._attempt(blob, offset):
                    offset += len(piece)
                    retries.moved()
                    yield piece
                return
            except TightbeamError as error:
                retries.failed(error, f"the download of {blob.name} ")

    def _attempt(self, blob: pb.Blob, offset: int) -> Iterator[bytes]:
        started_s, moved = time.perf_counter(), 0
        request = pb.DownloadRequest(sha256=blob.sha256, offset=offset)
        call = self._stub.Download(request, metadata=self._metadata)
        try:
            for chunk in call:
                moved += wire_bytes([chunk.ByteSize()], tls=self._tls)
                yield chunk.data
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()  # of a blob that is longer than it should be, nobody reads the rest
            row = {
                "row": "transfer",
                "kind": "weights",
                "name": blob.name,
                "wire_up_bytes": 0,
                "wire_down_bytes": moved,
            }
            self._on_row(row | {"seconds": time.perf_counter() - started_s, "time_unix_s": time.time()})
