"""The contract of one step, shared by both ends: its key, its content hash, its segments in a header."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tightbeam.common.backbone.packing import Segments
from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.codecs import codec
from tightbeam.common.wire.records import CHUNK_BYTES
from tightbeam.proto.backbone_pb2 import BACKWARD, FORWARD, StepKind, StepRequest, TensorSpec

__all__ = [
    "GRADIENT",
    "HIDDEN",
    "KINDS",
    "SESSION_KEY",
    "TENANT_KEY",
    "billed_records",
    "content_sha256",
    "header_segments",
    "rounding_seed",
    "tensor_sha256",
]

HIDDEN = "hidden"
GRADIENT = "grad_hidden"
SESSION_KEY = "tightbeam-session"  # gRPC metadata of a Steps stream: the session id in hex
TENANT_KEY = (
    "tightbeam-tenant"  # gRPC metadata of Usage and Download without TLS, where no certificate names who asks
)
KINDS: dict[StepKind.ValueType, str] = {FORWARD: "forward", BACKWARD: "backward"}


def header_segments(header: StepRequest) -> Segments:
    """The segments that a request names; `ProtocolError` when they contradict themselves."""
    if sum(header.run_lengths) != sum(header.lengths):
        raise ProtocolError("The position runs of a request do not cover its segments.")
    return Segments.from_runs(tuple(header.lengths), list(header.run_starts), list(header.run_lengths))


def tensor_sha256(spec: TensorSpec, payload: Tensor) -> bytes:
    """What makes two tensors that crossed the same: how they were coded, and the bytes."""
    digest = hashlib.sha256(f"{spec.name} {spec.codec} {spec.dtype} {list(spec.shape)} ".encode())
    digest.update(payload.numpy().data)
    return digest.digest()


def content_sha256(header: StepRequest, cut: str, tensors: Sequence[bytes]) -> bytes:
    """What makes two requests with one step key the same: everything that the answer follows from.

    Kind, cut, segments, shared rows, taps, and `tensor_sha256` of the forward's input, or of the backward's
    gradient and the inputs that it goes through, whether they came along or were held.
    """
    digest = hashlib.sha256(f"{header.kind} {cut} {header.reply_codec} ".encode())
    for numbers in (header.lengths, header.run_starts, header.run_lengths):
        digest.update(torch.tensor(list(numbers), dtype=torch.int64).numpy().tobytes() + b"|")
    if header.prefix_of:
        digest.update(f"prefixes {list(header.prefix_of)} {list(header.prefix_rows)} ".encode())
    if header.taps:
        digest.update(f"taps {list(header.taps)} {header.projection} ".encode())
    digest.update(b"".join(tensors))
    return digest.digest()


def billed_records(header: StepRequest, sealed_sizes: list[int]) -> list[int]:
    """Sizes of the records of a request that count, of the sizes of all.

    Inputs that a backward brings along crossed with the forward before, and were billed with it.
    """
    if header.kind != BACKWARD:
        return sealed_sizes
    gradient = header.tensors[0]
    num_bytes = codec(gradient.codec).num_bytes(tuple(gradient.shape))
    return sealed_sizes[: 1 + math.ceil(num_bytes / CHUNK_BYTES)]


def rounding_seed(run: str, step: int) -> int:
    """Seed of a step's stochastic rounding: a step that is sent or computed again gives the same bytes.

    Runs differ, so that the noise of federated edges averages out.
    """
    return int.from_bytes(hashlib.sha256(f"{run} {step}".encode()).digest()[:7], "little")
