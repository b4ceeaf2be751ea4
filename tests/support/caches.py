"""Small activation caches: numbered samples with made-up payloads."""

from pathlib import Path

from tightbeam.edge.cache import ActivationCache, Scope, sample_digest

__all__ = ["SCOPE", "SECRET", "digest", "filled", "opened", "payload"]

SCOPE = Scope(
    fingerprint="ab" * 32, trunk_dtype="float32", cut="2:2", bottom_sha256="", codec_up="fp32",
    codec_down="fp32", dtype="float32", hidden_size=8,
)  # fmt: skip
SECRET = bytes(range(32))


def digest(number: int) -> bytes:
    """Of sample `number`."""
    return sample_digest([number, 7, 9], [0, 1, 2])


def payload(number: int, size: int = 400) -> bytes:
    """What the trunk answered for it."""
    return bytes([number % 251, number % 241]) * (size // 2)


def opened(
    folder: Path,
    warnings: list[str] | None = None,
    *,
    scope: Scope = SCOPE,
    secret: bytes | None = SECRET,
    max_bytes: int = 10**7,
    shard_bytes: int = 2**20,
) -> ActivationCache:
    """A cache; without a list for its warnings, a warning fails the test."""

    def warn(line: str) -> None:
        assert warnings is not None, line
        warnings.append(line)

    return ActivationCache(
        folder, scope, secret=secret, max_bytes=max_bytes, warn=warn, shard_bytes=shard_bytes
    )


def filled(folder: Path, count: int = 6, *, shard_bytes: int = 2**20) -> None:
    """Put the first `count` samples into a folder."""
    with opened(folder, shard_bytes=shard_bytes) as cache:
        for number in range(count):
            assert cache.put(digest(number), payload(number))
