"""Taps: hidden states that inner blocks of the trunk put out, raw or through a published projection.

A projection is fitted once, on public text: for every block its mean and a whitened PCA basis. It is a
safetensors file that its SHA-256 names, so that an edge's side network, its cache and the cloud mean the same
numbers. What is projected is clamped: the first token of a sequence lies a hundred deviations out.

N = tokens, D = hidden size, P = projected size.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tightbeam.common.errors import UsageError

__all__ = ["MAX_TAPS", "PROJECTION_BLOB", "Projection", "Taps", "tap_name"]

MAX_TAPS = 16
"""In one step, unless the operator says otherwise."""
PROJECTION_BLOB = "projection."
"""How the names of such blobs start; they are no weights and not part of the fingerprint."""
_CLAMP = 8.0  # standard deviations
_FORMAT = "tightbeam.projection/1"


@dataclass(frozen=True, slots=True)
class Taps:
    """What one edge asks for with every forward."""

    blocks: tuple[int, ...]  # ascending; a tap is what the block puts out
    size: int  # elements per token and tap: P, or D when raw
    projection: str = ""  # SHA-256; empty: raw

    @property
    def names(self) -> tuple[str, ...]:
        """Of the reply's tensors, in order."""
        return tuple(map(tap_name, self.blocks))


def tap_name(block: int) -> str:
    """What the tap of a block is called in a reply."""
    return f"tap.{block}"


@dataclass(frozen=True)
class Projection:
    """One fitted projection: for each block its mean `[D]` and basis `[D, P]`, float32."""

    means: Mapping[int, Tensor]
    bases: Mapping[int, Tensor]
    facts: Mapping[str, str | int] = field(default_factory=dict)  # of which backbone and text

    def __call__(self, block: int, hidden_ND: Tensor) -> Tensor:
        """Whitened leading components, `[N, P]` in the dtype of `hidden_ND`; float32 inside."""
        centred_ND = hidden_ND.float() - self.means[block]
        return (centred_ND @ self.bases[block]).clamp(-_CLAMP, _CLAMP).to(hidden_ND.dtype)

    @property
    def size(self) -> int:
        """P."""
        return int(next(iter(self.bases.values())).shape[1])

    def to(self, device: torch.device) -> "Projection":
        """The same on a device."""
        means = {i: t.to(device) for i, t in self.means.items()}
        return Projection(means, {i: t.to(device) for i, t in self.bases.items()}, self.facts)

    def to_bytes(self) -> bytes:
        """The file that its SHA-256 names; the same bytes for the same numbers and facts."""
        tensors = {f"mean.{i}": t.cpu().contiguous() for i, t in self.means.items()}
        tensors |= {f"basis.{i}": t.cpu().contiguous() for i, t in self.bases.items()}
        # one key only: safetensors writes several in no fixed order
        facts = {"facts": json.dumps({"format": _FORMAT, **self.facts}, sort_keys=True)}
        data: bytes = save(tensors, facts)
        return data

    @classmethod
    def from_file(cls, path: Path) -> "Projection":
        """Read what `to_bytes` wrote; raises `UsageError` for anything else."""
        try:
            data = path.read_bytes()
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            facts = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["facts"])
            means, bases = (
                {int(n.partition(".")[2]): t for n, t in tensors.items() if n.startswith(kind)}
                for kind in ("mean.", "basis.")
            )
            if facts.pop("format") == _FORMAT and _agree(means, bases):
                return cls(means, bases, facts)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
            pass
        raise UsageError(
            f"{path} is no projection of this version.",
            cure="Fit one with `tightbeam serve --projection-text FILE`.",
        )

    @staticmethod
    def sha256(data: bytes) -> str:
        """Hex digest of the file."""
        return hashlib.sha256(data).hexdigest()


def _agree(means: Mapping[int, Tensor], bases: Mapping[int, Tensor]) -> bool:
    shapes = {tuple(t.shape) for t in bases.values()}
    finite = all(bool(t.isfinite().all()) for t in (*means.values(), *bases.values()))
    if means.keys() != bases.keys() or len(shapes) != 1 or not finite:
        return False
    (shape,) = shapes
    return len(shape) == 2 and all(t.shape == shape[:1] for t in means.values())
