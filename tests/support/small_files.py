"""A disk that is full, without one: the kernel refuses files above a size."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

__all__ = ["largest_file"]


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let every write beyond `num_bytes` of a file fail; skips the test where no such limit exists."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
