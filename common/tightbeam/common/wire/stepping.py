"""The contract of one step, shared by both ends: its key, its content hash, its segments in a header."""

import hashlib

import torch
from torch import Tensor

from tightbeam.common.backbone.packing import Segments
from tightbeam.common.errors import ProtocolError
from tightbeam.proto.backbone_pb2 import BACKWARD, FORWARD, StepKind, StepRequest

__all__ = [
    "GRADIENT",
    "HIDDEN",
    "KINDS",
    "SESSION_KEY",
    "TENANT_KEY",
    "content_sha256",
    "header_segments",
    "rounding_seed",
]

HIDDEN = "hidden"
GRADIENT = "grad_hidden"
SESSION_KEY = "tightbeam-session"  # gRPC metadata of a Steps stream: the session id in hex
TENANT_KEY = "tightbeam-tenant"  # gRPC metadata of Usage without TLS, where no certificate names the caller
KINDS: dict[StepKind.ValueType, str] = {FORWARD: "forward", BACKWARD: "backward"}


def header_segments(header: StepRequest) -> Segments:
    """The segments that a request names; `ProtocolError` when they contradict themselves."""
    if sum(header.run_lengths) != sum(header.lengths):
        raise ProtocolError("The position runs of a request do not cover its segments.")
    return Segments.from_runs(tuple(header.lengths), list(header.run_starts), list(header.run_lengths))


def content_sha256(header: StepRequest, cut: str, payload: Tensor) -> bytes:
    """What makes two requests with one step key the same.

    Kind, cut, segments, shared rows, taps, the step's own tensor.

    A backward that re-sends its inputs is the same request as one that does not.
    """
    digest = hashlib.sha256(f"{header.kind} {cut} {header.reply_codec} ".encode())
    for numbers in (header.lengths, header.run_starts, header.run_lengths):
        digest.update(torch.tensor(list(numbers), dtype=torch.int64).numpy().tobytes() + b"|")
    if header.prefix_of:
        digest.update(f"prefixes {list(header.prefix_of)} {list(header.prefix_rows)} ".encode())
    if header.taps:
        digest.update(f"taps {list(header.taps)} {header.projection} ".encode())
    digest.update(payload.numpy().data)
    return digest.digest()


def rounding_seed(run: str, step: int) -> int:
    """Seed of a step's stochastic rounding: a step that is sent or computed again gives the same bytes.

    Runs differ, so that the noise of federated edges averages out.
    """
    return int.from_bytes(hashlib.sha256(f"{run} {step}".encode()).digest()[:7], "little")
