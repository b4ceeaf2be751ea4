"""The activation cache: what the trunk answered once, sealed on this edge's disk."""

from tightbeam.edge.cache.inspect import CacheInfo, clear_cache, inspect_cache, verify_cache
from tightbeam.edge.cache.keys import Scope, identity_secret, sample_digest
from tightbeam.edge.cache.store import ActivationCache

__all__ = [
    "ActivationCache",
    "CacheInfo",
    "Scope",
    "clear_cache",
    "identity_secret",
    "inspect_cache",
    "sample_digest",
    "verify_cache",
]
