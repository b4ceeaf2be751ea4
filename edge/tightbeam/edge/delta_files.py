"""What delta codecs remember, sealed beside a checkpoint: a resumed run goes on bit for bit.

    <run folder>/deltas/                     how it is sealed, as of an activation cache
    checkpoints/step-N/deltas-000.safetensors ...    shards as that cache has them

These are activations of private texts, so they are as well guarded as the cache. The cloud's end is not kept:
the edge leads, and a cloud that lacks what it names asks for it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from transformers import PreTrainedModel

from tightbeam.common.errors import IntegrityError, UsageError
from tightbeam.edge.cache import Scope
from tightbeam.edge.cache.keys import CacheKeys
from tightbeam.edge.cache.shards import OpenShard, Shard
from tightbeam.edge.cache.shortcut import FrozenParts
from tightbeam.edge.cache.store import open_keys
from tightbeam.edge.deltas import EdgeDeltas

__all__ = ["DeltaFiles"]

_SHARD_BYTES = 64 * 2**20


class DeltaFiles:
    """Puts what one run remembers beside its checkpoints.

    Args:
        deltas: What is remembered.
        scope: Backbone, cut and codecs.
        folder: Of the keys; made when absent.
        secret: Of the edge's identity; None takes (and makes) the folder's own key file.
        say: Gets a line when a checkpoint's files cannot be opened.
    """

    def __init__(
        self,
        deltas: EdgeDeltas,
        scope: Scope,
        folder: Path,
        *,
        secret: bytes | None,
        say: Callable[[str], None],
    ) -> None:
        self._deltas, self._scope, self._folder = deltas, scope, folder
        self._secret, self._say = secret, say

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        fingerprint: str,
        cut: str,
        folder: Path,
        *,
        secret: bytes | None,
        say: Callable[[str], None],
    ) -> Self | None:
        """Those of a split model's run; None when nothing is delta-coded."""
        try:
            parts = FrozenParts.of(model)
        except UsageError:
            return None  # not split
        if (deltas := parts.trunk.stepper.deltas) is None:
            return None
        width = int(model.config.get_text_config().hidden_size)
        scope = parts.scope(fingerprint, cut, "", model.dtype, width)
        return cls(deltas, scope, folder, secret=secret, say=say)

    def save(self, checkpoint: Path) -> None:
        """Write into a checkpoint's folder; `TightbeamError` when it cannot be written."""
        if not self._deltas.num_bytes:
            return
        for number, shard in enumerate(self._shards(self._keys())):
            shard.write(checkpoint).replace(checkpoint / f"deltas-{number:03}.safetensors")

    def load(self, checkpoint: Path) -> None:
        """Remember what was remembered then; nothing when that cannot be opened.

        Raises `IdentityError` when it is sealed with another identity.
        """
        paths = sorted(checkpoint.glob("deltas-*.safetensors"))
        if not paths:
            return
        try:
            self._deltas.restore(_entries(paths, self._keys()), self._scope.hidden_size)
        except IntegrityError as error:
            self._deltas.clear()
            self._say(f"{error.message} All samples cross as whole values once more.")

    def _keys(self) -> CacheKeys:
        self._folder.mkdir(parents=True, exist_ok=True)
        return open_keys(self._folder, self._secret, create=True)

    def _shards(self, keys: CacheKeys) -> Iterator[OpenShard]:
        shard = OpenShard(keys, self._scope)
        for number, entry in enumerate(self._deltas.entries()):
            shard.add((number.to_bytes(12) + bytes(4)).hex(), entry)  # its first twelve bytes are the nonce
            if shard.num_bytes >= _SHARD_BYTES:
                yield shard
                shard = OpenShard(keys, self._scope)
        if len(shard):
            yield shard


def _entries(paths: list[Path], keys: CacheKeys) -> Iterator[bytes]:
    for path in paths:
        with Shard(path, keys) as shard:
            yield from map(shard.read, sorted(shard))
