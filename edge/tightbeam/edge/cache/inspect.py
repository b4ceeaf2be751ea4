"""`tightbeam cache info|verify|clear`: look at a cache folder, check every entry of it, empty it."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tightbeam.common.errors import IntegrityError
from tightbeam.edge.cache.rows import entry_is_sound
from tightbeam.edge.cache.shards import Shard, read_header
from tightbeam.edge.cache.store import lock_cache, open_keys, read_facts, shard_paths

__all__ = ["CacheInfo", "ScopeInfo", "clear_cache", "inspect_cache", "verify_cache"]


@dataclass(frozen=True, slots=True)
class ScopeInfo:
    """The entries of one backbone, cut, bottom and codec."""

    scope: dict[str, object]
    num_entries: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What can be said of a folder without its key."""

    folder: Path
    sealed_by: str
    scopes: list[ScopeInfo]
    problems: list[str]

    def render(self) -> str:
        """Plain text, a line per scope."""
        total = sum(scope.num_bytes for scope in self.scopes)
        lines = [f"{self.folder}: {total / 1e6:.1f} MB, sealed with the edge's {self.sealed_by}"]
        for info in self.scopes:
            what = info.scope
            bottom = str(what["bottom_sha256"])[:12] or "none"
            lines.append(
                f"  {info.num_entries} entries, {info.num_bytes / 1e6:.1f} MB: backbone "
                f"{str(what['fingerprint'])[:12]}, cut {what['cut']}, codecs {what['codec_up']} up and "
                f"{what['codec_down']} down, {what['dtype']}, adapter below the cut: {bottom}"
            )
        return "\n".join([*lines, *(f"  damaged: {problem}" for problem in self.problems)])


def inspect_cache(folder: Path) -> CacheInfo:
    """Read the headers; they can be forged, `verify_cache` cannot be fooled.

    Raises:
        UsageError: The folder is no cache.
    """
    samples: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    problems = []
    sealed_by = str(read_facts(folder)["sealed_by"])
    for path in shard_paths(folder):
        try:
            facts, places, size = read_header(path)
            scope = json.dumps(json.loads(facts["scope"]), sort_keys=True)
        except (IntegrityError, KeyError, ValueError) as error:
            problems.append(str(error))
            continue
        samples[scope] += len(places)
        sizes[scope] += size
    scopes = [ScopeInfo(json.loads(scope), samples[scope], sizes[scope]) for scope in sorted(samples)]
    return CacheInfo(folder, sealed_by, scopes, problems)


def verify_cache(folder: Path, secret: bytes | None) -> tuple[int, list[str]]:
    """Open and judge every entry; gives the number of good ones and a line per damaged shard or entry.

    Raises:
        IdentityError: The folder is sealed otherwise.
        UsageError: It is no cache, or in use.
    """
    read_facts(folder)
    lock = lock_cache(folder)
    good, problems = 0, []
    try:
        keys = open_keys(folder, secret)
        for path in shard_paths(folder):
            try:
                shard = Shard(path, keys)
            except IntegrityError as error:
                problems.append(error.message)
                continue
            with shard:
                for name in shard:
                    try:
                        sound = entry_is_sound(shard.scope, shard.read(name))
                        if not sound:
                            problems.append(f"The entry {name} of {path.name} holds NaN or Inf.")
                        good += sound
                    except IntegrityError as error:
                        problems.append(error.message)
    finally:
        lock.release()
    return good, problems


def clear_cache(folder: Path) -> int:
    """Remove every file that the cache made, its key included; gives the bytes of it.

    Raises:
        UsageError: The folder is no cache, or in use.
    """
    read_facts(folder)
    lock = lock_cache(folder)
    freed = 0
    try:
        # cache.json last: a kill in between leaves a folder that can be cleared again.
        paths = [*shard_paths(folder), *folder.glob(".*.tmp"), folder / "key", folder / "cache.json"]
        for path in paths:
            if path.exists():
                freed += path.stat().st_size
                path.unlink()
    finally:
        lock.release(remove=True)
    return freed
