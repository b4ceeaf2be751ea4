"""Fit the projection of the taps once, on public text, and publish it by its hash.

For every block that the cloud runs: the mean and the leading principal directions of what it puts out, each
scaled to unit deviation. The first token of every sequence is left out: its norm is a hundred times the
others' and would be the first component. The text is the operator's choice; no tenant's data takes part.

N = tokens, D = hidden size, P = projected size.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from tightbeam.common.backbone import (
    PROJECTION_BLOB,
    Blob,
    Checkpoint,
    PackedTrunk,
    Projection,
    Segments,
    build_skeleton,
    config_from_dict,
    dissect,
    fill,
)
from tightbeam.common.errors import FingerprintError, UsageError
from tightbeam.common.files import atomic_write

__all__ = ["ProjectionOptions", "check_projection", "fit_projection", "projection_blob", "provide_projection"]

_log = logging.getLogger(__name__)
_SEQUENCE_TOKENS = 256
_MAX_TOKENS = 65_536  # enough for bases of a few hundred directions
_TOKENS_PER_DIRECTION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectionOptions:
    """What the operator says about it."""

    file: Path  # where it is, or will be
    text: Path | None = None  # fit on this, UTF-8; None: the file must be there
    size: int | None = None  # P; None: a sixteenth of D, at least 8


def provide_projection(
    options: ProjectionOptions, checkpoint: Checkpoint, trunk: PackedTrunk, loaded: range, fingerprint: str
) -> Projection:
    """The projection of `options.file`, fitted first when there is a text that it was not fitted on.

    Raises `UsageError`, and `FingerprintError` for one of another backbone.
    """
    size = options.size or max(trunk.hidden_size // 16, 8)
    if options.text is not None:
        try:
            data = options.text.read_bytes()
        except OSError as error:
            raise UsageError(
                f"Cannot read the projection text: {error}.", cure="Give --projection-text a UTF-8 file."
            ) from error
        facts = {"fingerprint": fingerprint, "text_sha256": hashlib.sha256(data).hexdigest()}
        if options.file.is_file():
            found = Projection.from_file(options.file)
            if (
                found.size == size
                and facts.items() <= found.facts.items()
                and found.bases.keys() == set(loaded)
            ):
                return found
        _log.info("fitting the projection of %d blocks to %d on %s", len(loaded), size, options.text)
        fitted = fit_projection(checkpoint, trunk, loaded, data.decode(errors="replace"), size, facts)
        atomic_write(options.file, fitted.to_bytes())
    projection = Projection.from_file(options.file)
    if projection.facts.get("fingerprint") != fingerprint:
        raise FingerprintError(
            f"The projection {options.file} was fitted for another backbone.",
            cure="Fit it again: --projection-text FILE.",
        )
    if missing := set(loaded) - projection.bases.keys():
        raise UsageError(
            f"The projection {options.file} lacks block {min(missing)}.",
            cure="Fit it again under this cut policy: --projection-text FILE.",
        )
    return projection


def check_projection(projection: Projection, trunk: PackedTrunk, loaded: range, dtype: torch.dtype) -> None:
    """The self-test of a projection: every block's gives finite numbers of the right shape in `dtype`.

    Raises `UsageError` for one that does not.
    """
    generator = torch.Generator().manual_seed(0)
    hidden_ND = 1e3 * torch.randn(5, trunk.hidden_size, generator=generator).to(dtype)
    for block in loaded:
        width = projection.bases[block].shape[0]
        tap_NP = projection(block, hidden_ND) if width == trunk.hidden_size else hidden_ND[:, :0]
        if tap_NP.shape != (5, projection.size) or not bool(tap_NP.isfinite().all()):
            raise UsageError(
                f"The projection does not fit block {block} of this backbone.", cure="Fit it again."
            )


def fit_projection(
    checkpoint: Checkpoint,
    trunk: PackedTrunk,
    loaded: range,
    text: str,
    size: int,
    facts: dict[str, str],
) -> Projection:
    """Means and whitened bases of all `loaded` blocks; the same on the same machine.

    Raises `UsageError` when the text has too few tokens for so many directions.
    """
    if not 1 <= size <= trunk.hidden_size:
        raise UsageError(
            f"A tap of {size} elements does not fit a width of {trunk.hidden_size}.",
            cure="Change --tap-size.",
        )
    moments = {index: _Moments(trunk.hidden_size, trunk.device()) for index in loaded}
    for hidden_ND, segments in _inputs(checkpoint, trunk, loaded, text):
        with torch.no_grad():
            tapped = trunk.run_tapped(hidden_ND, segments, loaded, loaded)[1]
        for index, tap_ND in tapped.items():
            moments[index].add(tap_ND[1:])
    count = moments[loaded[0]].count
    if count < _TOKENS_PER_DIRECTION * size:
        raise UsageError(
            f"The projection text has {count} usable tokens, too few for {size} directions.",
            cure="Give --projection-text a longer text; a few hundred kilobytes are plenty.",
        )
    means, bases, kept = {}, {}, 1.0
    for index, moment in moments.items():
        means[index], bases[index], share = moment.basis(size)
        kept = min(kept, share)
    return Projection(means, bases, {**facts, "tokens": count, "variance_kept": f"{kept:.4f}"})


def projection_blob(path: Path, sha256: str) -> Blob:
    """The file as edges download it."""
    blob = Blob(f"{PROJECTION_BLOB}{sha256[:12]}", b"", ((path, 0, path.stat().st_size),))
    if blob.sha256 != sha256:
        raise UsageError(f"{path} changed while it was read.", cure="Start again.")
    return blob


class _Moments:
    """Sums of one block's output, in double precision."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._exact = torch.float32 if device.type == "mps" else torch.float64
        self.count = 0
        self._sum_D = torch.zeros(width, dtype=self._exact, device=device)
        self._square_DD = torch.zeros(width, width, dtype=self._exact, device=device)

    def add(self, tap_ND: Tensor) -> None:
        exact_ND = tap_ND.to(self._exact)
        self.count += len(exact_ND)
        self._sum_D += exact_ND.sum(0)
        self._square_DD += exact_ND.T @ exact_ND

    def basis(self, size: int) -> tuple[Tensor, Tensor, float]:
        """Mean, whitened basis `[D, P]`, and the share of variance that it keeps."""
        total, square_DD = self._sum_D.cpu().double(), self._square_DD.cpu().double()
        mean_D = total / self.count
        values_D, vectors_DD = torch.linalg.eigh(square_DD / self.count - torch.outer(mean_D, mean_D))
        values_P, vectors_DP = values_D[-size:].flip(0), vectors_DD[:, -size:].flip(1)
        # an eigenvector's sign is arbitrary: its largest element is positive here
        largest_P = vectors_DP.gather(0, vectors_DP.abs().argmax(0, keepdim=True))[0]
        vectors_DP = vectors_DP * largest_P.sign()
        floor = float(values_D[-1]) * 1e-9  # a direction without variance stays one without
        basis_DP = vectors_DP / values_P.clamp_min(max(floor, 1e-12)).sqrt()
        share = float(values_P.sum() / values_D.clamp_min(0.0).sum().clamp_min(1e-30))
        return mean_D.float(), basis_DP.float().contiguous(), share


class _Stop(Exception):  # noqa: N818 - no error: the forward has gone far enough
    pass


class _Catch(nn.Module):
    """Stands in the place of the first block of the trunk and takes its input."""

    def __init__(self, attention_type: Any) -> None:
        super().__init__()
        self.attention_type = attention_type

    def forward(self, hidden_1ND: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.caught_1ND = hidden_1ND
        raise _Stop


def _inputs(
    checkpoint: Checkpoint, trunk: PackedTrunk, loaded: range, text: str
) -> Iterator[tuple[Tensor, Segments]]:
    """What enters the first loaded block, sequence by sequence, on the trunk's device.

    The cloud holds no embeddings; they and the blocks below are loaded for this and let go again.
    """
    dtype = next(p.dtype for block in trunk.blocks for p in block.parameters() if not p.is_meta)
    model = build_skeleton(config_from_dict(checkpoint.config), dtype)
    anatomy = dissect(model)
    catch = _Catch(getattr(anatomy.blocks[loaded[0]], "attention_type", None))
    for index in range(loaded[0], len(anatomy.blocks)):
        anatomy.blocks[index] = catch
    above = (anatomy.head_path + ".",)
    fill(
        model,
        lambda name: checkpoint.load(name) if name in checkpoint.tensors else None,
        lambda name: not name.startswith(above),
        dtype,
        trunk.device(),
    )
    for ids in _sequences(checkpoint.folder, text, trunk.config.max_position_embeddings):
        with torch.no_grad():
            try:
                anatomy.trunk_owner(input_ids=torch.tensor([ids], device=trunk.device()), use_cache=False)
            except _Stop:
                yield catch.caught_1ND[0], Segments((len(ids),), torch.arange(len(ids)))


def _sequences(folder: Path, text: str, max_positions: int) -> Iterator[list[int]]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{folder} has no usable tokenizer to read the projection text with.",
            cure="Save the tokenizer beside the model, or give a fitted --projection file.",
        ) from error
    ids = tokenizer(text[: 8 * _MAX_TOKENS], add_special_tokens=False, verbose=False)["input_ids"]
    length = min(_SEQUENCE_TOKENS, max_positions)
    for start in range(0, min(len(ids), _MAX_TOKENS), length):
        yield ids[start : start + length]
